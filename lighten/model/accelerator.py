"""The device that does the arithmetic: its name, its memory, and its counters. Only this file asks torch about GPUs.

A device has torch's name: "cpu", "cuda" (the first GPU that is visible), "cuda:1".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from lighten.errors import RequestError
from lighten.process.isolate import run_isolated
from lighten.step import Report

NAME = re.compile(r"cpu|cuda(:[0-9]+)?")
ROOM = 0.9
"""Share of a GPU's memory that work is planned for. The driver and the allocator's gaps take the rest."""


@dataclass(frozen=True)
class Device:
    """A device of this machine, and what is known of it without importing torch."""

    name: str
    title: str | None = None
    """Name by its maker; None for the processor."""
    total_bytes: int | None = None
    """Bytes of its own memory; None for the processor."""
    note: str | None = None
    """Remark for the person about the choice of the device."""

    @property
    def type(self) -> str:
        """Type of the device: "cpu" or "cuda"."""
        return device_type(self.name)

    def key(self) -> dict[str, str]:
        """Returns the part of a key that the device adds to what was computed on it; nothing for the processor."""
        return {} if self.name == "cpu" else {"device": self.type}

    def holds(self, size: float) -> bool:
        """Returns whether its memory has room for so many bytes. The processor always has."""
        return self.total_bytes is None or size <= ROOM * self.total_bytes


CPU = Device("cpu")


def device_type(device: str) -> str:
    """Returns the type of a device: "cpu" or "cuda"."""
    return device.partition(":")[0]


def index(device: str) -> int:
    """Returns the number of a GPU among those that are visible."""
    return int(device.partition(":")[2] or 0)


def resolve(name: str, *, gpus: bool) -> Device:
    """Returns the device of a name. "auto" is a GPU if torch can use one.

    Torch is asked in a process of its own: a driver's tool may show a GPU that the installed torch was not built for.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        gpus: whether the machine shows a GPU at all; if not, "auto" is the processor without asking torch.

    Raises:
        RequestError: the name means nothing here, or torch does not see the GPU.
    """
    if name == "cpu" or (name == "auto" and not gpus):
        return CPU
    if name != "auto" and not NAME.fullmatch(name):
        raise RequestError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N")
    found = run_isolated("lighten.model.accelerator:survey", {}).value
    devices = found["devices"]
    if not devices:
        if name == "auto":
            return Device("cpu", note=f"this machine has a GPU, but {found['reason']}: the CPU is used")
        raise RequestError(f"the device {name} cannot be used: {found['reason']}. Use --device cpu")
    wanted = "cuda" if name == "auto" else name
    if index(wanted) >= len(devices):
        last = f"cuda:{len(devices) - 1}"
        raise RequestError(f"the device {name} is not there: torch sees {len(devices)} GPUs, the last one is {last}")
    return Device(wanted, **devices[index(wanted)])


def survey(_payload: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Returns `devices` (title and memory of every GPU that torch can use) and, if there is none, the `reason`."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return {"devices": [], "reason": f"torch {torch.__version__} was built for CPUs only: install a CUDA build"}
    if not torch.cuda.is_available():
        return {"devices": [], "reason": f"torch {torch.__version__} sees no GPU that its driver and build can use"}
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append({"title": facts.name, "total_bytes": int(facts.total_memory)})
    return {"devices": found, "reason": None}


def free_bytes(device: str) -> int | None:
    """Returns the free memory of a GPU, with what torch holds of it unused; None for the processor."""
    if device_type(device) != "cuda":
        return None
    import torch

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def fits(size: float, device: str, share: float = 0.5) -> bool:
    """Returns whether so many bytes take at most a share of the device's free memory; never on the processor.

    Data lies in the processor's memory anyway, so nothing is moved there to be faster.
    """
    free = free_bytes(device)
    return free is not None and size <= share * free


def synchronize(device: str) -> None:
    """Waits until the device has finished its work."""
    if device_type(device) == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_bytes(device: str) -> int | None:
    """Returns the peak of a GPU's memory since `reset_peak`; None for the processor."""
    if device_type(device) != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def reset_peak(device: str) -> None:
    """Starts a new count of the peak of a GPU's memory."""
    if device_type(device) == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def uuid(device: str) -> str:
    """Returns the identity of a GPU in the spelling of NVML. Numbers change if some GPUs are hidden."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def deterministic(device: str) -> None:
    """Makes further work in this process give the same results every time on a GPU.

    Call it before the device is used. If torch has no such kernel, it warns and goes on. On the processor results are
    always the same.
    """
    if device_type(device) != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
