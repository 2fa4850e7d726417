"""`transformers serve`: model directories, in the program that made them."""

from __future__ import annotations

from typing import ClassVar

from lighten.evaluate.serving.program import HOST, Installed, Job, Program, Start


class Transformers(Program):
    """`transformers serve`. It gives no log-probabilities, so that only its speed under load is known."""

    name: ClassVar[str] = "transformers"
    modules: ClassVar[tuple[str, ...]] = ("transformers", "fastapi", "uvicorn", "openai", "accelerate")
    install: ClassVar[str] = "'transformers[serving]'"
    own: ClassVar[tuple[str, ...]] = ("--host", "--port", "--device")

    def start(self, job: Job, installed: Installed) -> Start:
        """See `Program`."""
        command = [*installed.python, "-m", "transformers.cli.transformers", "serve", str(job.place)]
        command += ["--host", HOST, "--port", str(job.port), "--device", job.device]
        return Start(command, str(job.place), {})
