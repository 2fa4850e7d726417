"""llama.cpp's OpenAI-compatible server, started as by a person: over HTTP, streaming."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from lighten.errors import Failure, missing_extra
from lighten.evaluate import machine
from lighten.model import llama_library
from lighten.process.isolate import death, die_with, environment, interpreter

PYTHON_NEEDS = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
"""Modules of the server that is written in Python."""
START_SECONDS = 120
ANSWER_SECONDS = 600
BANNED = -100
"""Bias that prevents the choice of a token."""


KEPT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "USER", "VIRTUAL_ENV")
KEPT_FAMILIES = ("CUDA_", "DYLD_", "GGML_", "GOMP_", "HIP_", "HSA_", "KMP_", "LC_", "OMP_", "PYTHON", "ROCR_", "XDG_")
"""Beginnings of the names of environment variables that the server's process gets."""


def own_environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """Returns an environment for the server, which reads every setting there that its arguments leave open.

    Otherwise a HOST, an API_KEY or a CONFIG_FILE of the person, which has another purpose, would become its setting.

    Args:
        env: the environment of its Python; None for that of ours.
    """
    given = environment() if env is None else env
    return {name: value for name, value in given.items() if name in KEPT or name.startswith(KEPT_FAMILIES)}


def needs() -> tuple[str, ...]:
    """Returns the modules that serving needs: none besides llama.cpp if it has its own server."""
    found = llama_library.installed()
    return PYTHON_NEEDS if found and not found.server else (llama_library.module(),)


def server_environment(library: Path) -> dict[str, str]:
    """Returns the environment for llama.cpp's own server, whose first library is to be `library`: libllama.

    Each library of the wheel has a copy of parts of the C++ library. An object that libllama makes to split text by a
    regular expression would be destroyed by the copy of another, which ends the process: of all names that two of them
    define, the program takes those of the library that is loaded first.
    """
    return own_environment() | ({"LD_PRELOAD": str(library)} if sys.platform == "linux" else {})


class Refused(Exception):
    """The error that the server did not answer a request to its end."""


def native(program: Path) -> list[str]:
    """Returns the command of llama.cpp's own server, without the model and its place."""
    layers = ["--n-gpu-layers", "0", "--device", "none"]  # the wheel has no kernels for CUDA
    return [str(program), *layers, "--offline", "--no-webui", "--parallel", "1"]  # one request after the other


def python_server(python: list[str], device: str, *, scores: bool = False) -> list[str]:
    """Returns the command of the server that is written in Python, without the model and its place.

    Args:
        python: command of a Python that has it.
        device: "cpu", or a GPU.
        scores: whether it is to keep the logits of a prompt, of which it gives log-probabilities.
    """
    command = [*python, "-m", "llama_cpp.server", "--n_gpu_layers", "0" if device == "cpu" else "-1"]
    # a new request would end the one before it
    return [*command, "--logits_all", str(scores).lower(), "--interrupt_requests", "false"]


class LlamaServer:
    """A server that runs until the end of its block. It never outlives this process."""

    def __init__(self, path: Path, context: int, device: str) -> None:
        """Prepares a server for a .gguf file and texts of at most `context` tokens.

        Raises:
            RequestError: a package is missing.
        """
        for module in needs():
            if find_spec(module) is None:
                raise missing_extra("serve", module, f"serving {path.name} over HTTP")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        found = llama_library.load(f"serving {path.name} over HTTP").installed
        self.name = f"llama-server of {found}" if found.server else f"llama_cpp.server {found.version}"
        self.device = "cpu" if found.server else device
        threads = str(machine.cores())
        self._command = native(found.server) if found.server else python_server(interpreter(), device)
        self._env = server_environment(found.library("llama")) if found.server else own_environment()
        self._command += ["--model", str(path), "--host", "127.0.0.1", "--port", str(self.port)]
        names = ("--ctx-size", "--threads", "--threads-batch")
        if not found.server:
            names = ("--n_ctx", "--n_threads", "--n_threads_batch")
        self._command += [part for pair in zip(names, (str(context), threads, threads), strict=True) for part in pair]
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Starts the server and waits until it answers.

        Raises:
            Failure: the server ended, or does not answer.
        """
        self._process = subprocess.Popen(
            self._command,
            stdout=self._noise,
            stderr=self._noise,
            env=self._env,
            preexec_fn=partial(die_with, os.getpid()),
        )
        deadline = time.monotonic() + START_SECONDS
        try:
            while not self._answers():
                self.check("before it answered")
                if time.monotonic() > deadline:
                    raise Failure(f"{self.name} does not answer after {START_SECONDS} s: {self._tail()}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the server."""
        assert self._process
        self._process.kill()
        self._process.wait()
        self._noise.close()

    @property
    def pid(self) -> int:
        """Number of the server's process."""
        assert self._process
        return self._process.pid

    def check(self, when: str) -> None:
        """Raises Failure if the server has ended."""
        assert self._process
        code = self._process.poll()
        if code is not None:
            raise Failure(f"{self.name} ended {when} ({death(code)}): {self._tail()}")

    def _tail(self, limit: int = 1000) -> str:
        size = os.fstat(self._noise.fileno()).st_size
        text = os.pread(self._noise.fileno(), limit, max(0, size - limit)).decode(errors="replace")
        return " ".join(text.split()) or "it printed nothing"

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def stream(self, prompt: str, steps: int, banned: list[int]) -> list[float]:
        """Returns the moments (`time.perf_counter`) at which each token of a greedy answer arrived.

        A token is a piece of text that the server sends. A token that is no whole character comes with the next one.

        Raises:
            Refused: the server did not answer to the end.
        """
        asked = {
            "prompt": prompt,
            "max_tokens": steps,
            "temperature": 0,
            "stream": True,
            "logit_bias": {str(token): BANNED for token in banned},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        moments: list[float] = []
        try:
            connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise Refused(f"status {response.status}: {response.read(300).decode(errors='replace')}")
            while line := response.readline():
                name, _, value = line.partition(b": ")
                if name != b"data":
                    continue
                if value.strip() == b"[DONE]":
                    return moments
                event = json.loads(value)
                if "error" in event:
                    raise Refused(str(event["error"]))
                if event["choices"][0]["text"]:
                    moments.append(time.perf_counter())
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        raise Refused("it stopped before the end")
