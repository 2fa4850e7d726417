"""llama.cpp's servers: .gguf files, by llama-server or by the server that is written in Python."""

from __future__ import annotations

from importlib.util import find_spec
from typing import ClassVar

from lighten.errors import missing_extra
from lighten.evaluate import machine
from lighten.evaluate.serving.program import HOST, Installed, Job, Program, Start
from lighten.evaluate.serving.settings import Serve
from lighten.evaluate.speed.server import (
    PYTHON_NEEDS,
    native,
    needs,
    own_environment,
    python_server,
    server_environment,
)
from lighten.model import llama_library
from lighten.process.isolate import interpreter


class LlamaCpp(Program):
    """The server of the package that brings llama.cpp; with `python`, the one that is written in Python, there."""

    name: ClassVar[str] = "llama.cpp"
    modules: ClassVar[tuple[str, ...]] = ("llama_cpp", *PYTHON_NEEDS)
    packages: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = f"'{llama_library.SOURCE}[server]'"
    own: ClassVar[tuple[str, ...]] = (
        "--host",
        "--port",
        "--model",
        "-m",
        "--alias",
        "-a",
        "--model_alias",
        "--api-key",
    )
    serves: ClassVar[tuple[str, ...]] = ("llama.cpp",)

    def installed(self, serve: Serve) -> Installed:
        """See `Program`. llama-server is a program of its own, which needs no Python."""
        if serve.python is not None:
            there = super().installed(serve)
            return Installed(there.python, own_environment(there.env), there.packages)
        for module in needs():
            if find_spec(module) is None:
                raise missing_extra("serve", module, "serving .gguf files")
        found = llama_library.installed()
        assert found
        env = server_environment(found.library("llama")) if found.server else own_environment()
        return Installed(interpreter(), env, {found.package: found.version}, found.server)

    def start(self, job: Job, installed: Installed) -> Start:
        """See `Program`."""
        threads = str(machine.cores())
        if installed.program:
            command, names = native(installed.program), ("--alias", "--ctx-size", "--threads", "--threads-batch")
        else:
            command = python_server(installed.python, job.device, scores=True)
            names = ("--model_alias", "--n_ctx", "--n_threads", "--n_threads_batch")
        values = (job.name, str(job.positions), threads, threads)
        command += ["--model", str(job.place), "--host", HOST, "--port", str(job.port)]
        return Start([*command, *(part for pair in zip(names, values, strict=True) for part in pair)], job.name, {})
