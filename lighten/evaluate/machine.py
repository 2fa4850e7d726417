"""The machine of a measurement: processor, memory, operating system, GPUs and package versions, without torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from lighten.evaluate import machine
from lighten.model import llama_library

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
PACKAGES = (
    "lighten",
    "torch",
    "transformers",
    "gptqmodel",
    "optimum",
    *llama_library.PACKAGES,
    "gguf",
    "onnxruntime",
    "onnxruntime-genai",
)


@cache
def fingerprint() -> dict[str, Any]:
    """Returns the machine as JSON: cpu, cores (physical), memory_bytes, os, python, flags, gpus, packages."""
    cpu, flags = _processor()
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "gpus": _gpus(),
        "packages": packages(),
    }


def cores() -> int:
    """Returns the physical cores this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return min(physical, allowed)


def packages(more: Iterable[str] = ()) -> dict[str, str]:
    """Returns the versions of the installed packages that affect a measurement, and of `more`."""
    found = {}
    for name in dict.fromkeys((*PACKAGES, *more)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return facts.get("model name") or platform.processor() or platform.machine(), flags


def _gpus() -> list[str]:
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    try:
        asked = [command, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


MEASURING_PACKAGES = ("torch", "transformers", "gptqmodel", "onnxruntime", "onnxruntime-genai")


def measuring_packages(runtime: Iterable[str] = ()) -> dict[str, str]:
    """Returns the versions of the packages whose arithmetic a measurement shows.

    Each of our runtimes counts for all our runtimes. Other packages, such as those of an added `runtime`, count for
    that runtime alone.
    """
    used = llama_library.installed()
    added = [name for name in runtime if name not in PACKAGES]
    names = (*MEASURING_PACKAGES, used.package if used else "", *added)
    return {name: number for name, number in machine.packages(added).items() if name in names}


def this_machine() -> dict[str, Any]:
    """Returns what a speed depends on: processor, cores, memory, GPUs."""
    found = machine.fingerprint()
    return {name: found.get(name) for name in ("cpu", "cores", "memory_bytes", "gpus")}
