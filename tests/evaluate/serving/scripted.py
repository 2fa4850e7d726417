"""A server that lighten starts, with a real model behind it, and with the misfortunes that a test gives it."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import JsonValue

from lighten.evaluate.serving.program import Installed, Job, Program, Start


class Scripted(Program):
    """Gives log-probabilities by `prompt_logprobs`."""

    name: ClassVar[str] = "scripted"
    modules: ClassVar[tuple[str, ...]] = ("lighten",)
    packages: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = "nothing"

    def start(self, job: Job, installed: Installed) -> Start:
        command = [*installed.python, "-m", __name__, "--model", str(job.place), "--name", job.name]
        return Start([*command, "--port", str(job.port)], job.name, {})

    def loaded(self, log: str) -> dict[str, JsonValue]:
        return {"kernels": [line.removeprefix("kernel: ") for line in log.splitlines() if line.startswith("kernel: ")]}


class Fatal(list[Any]):
    """A list that kills its process when it has become too long."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def append(self, each: Any) -> None:
        super().append(each)
        if len(self) > self.longest:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--name"):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int)
    parser.add_argument("--requests", type=int, default=1 << 30, help="requests after which it is killed")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--hang", action="store_true")
    given = parser.parse_args()
    print("kernel: plain", flush=True)
    if given.fail:
        sys.exit("RuntimeError: no room for the weights\n\n")
    if given.hang:
        time.sleep(600)

    from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
    from tests.evaluate.runtimes import api_server
    from tests.evaluate.runtimes.api_server import Manners

    place = Path(given.model)
    manners = Manners(names=[given.name], forms={"prompt_logprobs"}, asked=Fatal(given.requests))
    with api_server.serving(manners, open_runtime(place), open_tokenizer(place), port=given.port):
        threading.Event().wait()


if __name__ == "__main__":
    main()
