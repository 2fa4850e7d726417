"""mlx-lm's server: MLX and model directories, on Apple's chips, and on other processors with `mlx[cpu]`."""

from __future__ import annotations

import json
import re
from http.client import HTTPException
from typing import ClassVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from lighten.evaluate.serving.program import HOST, Installed, Job, Program, Start

DIED = re.compile(r"generation thread died: (.+)|^Exception in thread Thread-\d+ \(_(?:run_)?generate\):()", re.M)
"""Line of its log about the thread that loads the model and writes: mlx-lm 0.31 leaves Python's own words."""
ERROR = re.compile(r"^[\w.]*(?:Error|Exception): .+", re.M)
LOAD_SECONDS = 10.0
"""Seconds of a request that waits for the model. Then another one is sent."""


class Mlx(Program):
    """`mlx_lm server`. It takes prompts as text only, and gives no log-probabilities of them."""

    name: ClassVar[str] = "mlx"
    modules: ClassVar[tuple[str, ...]] = ("mlx_lm", "mlx")
    packages: ClassVar[tuple[str, ...]] = ("mlx", "transformers")
    install: ClassVar[str] = "mlx-lm ('mlx[cpu]' too without an Apple chip)"
    serves: ClassVar[tuple[str, ...]] = ("mlx", "torch")

    def start(self, job: Job, installed: Installed) -> Start:
        """See `Program`. It lists a model by its place without links, and would load it once more by another name."""
        place = str(job.place.resolve())
        command = [*installed.python, "-m", "mlx_lm", "server", "--model", place, "--host", HOST]
        # it lists the models of the hub's cache too, and fails without a cache: any folder is one without models
        return Start([*command, "--port", str(job.port)], place, {"HF_HUB_CACHE": "."})

    def ready(self, url: str, model: str) -> bool:
        """See `Program`. It lists the model at once, and answers a first request when it has loaded it."""
        body = json.dumps({"model": model, "prompt": "1", "max_tokens": 1}).encode()
        request = Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=LOAD_SECONDS) as answer:
                return bool(answer.read())
        except HTTPError as error:
            return b"thread died" not in error.read()
        except (OSError, HTTPException):
            return False

    def lost(self, log: str) -> str | None:
        """See `Program`. The server runs on without the thread that loads the model and writes."""
        if not (died := DIED.search(log)):
            return None
        told = ERROR.findall(log, died.end())
        return died[1] or (told[0] if told else "the thread that writes has ended")
