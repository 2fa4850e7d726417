"""What does the arithmetic: its name, its memory, and its counters. The one place that asks torch about GPUs.

A device is named as torch names it: "cpu", "cuda" (the first GPU that is visible), "cuda:1".
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
"""Share of a GPU's memory that work is planned for: the driver and the allocator's gaps take the rest."""


@dataclass(frozen=True)
class Device:
    """A device that is there, and what is known of it without importing torch."""

    name: str
    title: str | None = None
    """What its maker calls it; None for the processor."""
    total_bytes: int | None = None
    """Its own memory; None for the processor."""
    note: str | None = None
    """What the person should know about the choice."""

    @property
    def kind(self) -> str:
        """Returns "cpu" or "cuda"."""
        return kind(self.name)

    def key(self) -> dict[str, str]:
        """Returns what the device adds to the key of what was computed on it: nothing for the processor."""
        return {} if self.name == "cpu" else {"device": self.kind}

    def holds(self, size: float) -> bool:
        """Returns whether its memory has room for so many bytes; a processor's is not asked."""
        return self.total_bytes is None or size <= ROOM * self.total_bytes


CPU = Device("cpu")


def kind(device: str) -> str:
    """Returns the kind of a device: "cpu" or "cuda"."""
    return device.partition(":")[0]


def index(device: str) -> int:
    """Returns the number of a GPU among those that are visible."""
    return int(device.partition(":")[2] or 0)


def resolve(name: str, *, gpus: bool) -> Device:
    """Returns the device of a name; "auto" is a GPU where torch can use one.

    Torch is asked in a process of its own: a driver's tool may show a GPU that the installed torch was not built for.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        gpus: whether the machine shows a GPU at all; if not, "auto" asks nobody.

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
    if kind(device) != "cuda":
        return None
    import torch

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def fits(size: float, device: str, share: float = 0.5) -> bool:
    """Returns whether so many bytes take at most a share of the device's free memory; never on the processor.

    The processor's memory is where things lie anyway: nothing is moved there to be quicker.
    """
    free = free_bytes(device)
    return free is not None and size <= share * free


def synchronize(device: str) -> None:
    """Waits until the device has done what it was asked for."""
    if kind(device) == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_bytes(device: str) -> int | None:
    """Returns the peak of a GPU's memory since `reset_peak`; None for the processor."""
    if kind(device) != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def reset_peak(device: str) -> None:
    """Begins to count the peak of a GPU's memory anew."""
    if kind(device) == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def uuid(device: str) -> str:
    """Returns the identity of a GPU, as its driver's library NVML spells it: numbers differ where some are hidden."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def deterministic(device: str) -> None:
    """Makes what follows in this process the same every time on a GPU; call before the device is used.

    Where torch has no such kernel it warns and goes on; on the processor everything is the same every time already.
    """
    if kind(device) != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
