"""Energy of processor packages, from Linux's RAPL counters, and of NVIDIA GPUs, from their driver's (NVML)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.model import accelerator

RAPL = Path("/sys/class/powercap")
GPU_SECONDS = 2.0
"""Minimum seconds of a measurement with a GPU's counter, which moves some ten times in a second."""


class Counters:
    """The energy counters of all processor packages. `note` says why there are none, or what they cover."""

    least = 0.0
    """Seconds that a measurement should last."""

    def __init__(self, root: Path = RAPL) -> None:
        packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
        self._packages: list[tuple[Path, int]] = []
        if not packages:
            self.note = f"this machine has no RAPL energy counters ({root}/intel-rapl:*)"
            return
        try:
            for path in packages:
                (path / "energy_uj").read_text()
                self._packages.append((path / "energy_uj", int((path / "max_energy_range_uj").read_text())))
        except (OSError, ValueError) as error:
            self._packages = []
            self.note = f"the RAPL energy counters cannot be read ({error}); they are for root only on most systems"
            return
        self.note = "processor packages (RAPL) while decoding at the first batch size after a prompt of one token"

    def __bool__(self) -> bool:
        return bool(self._packages)

    def read(self) -> list[int]:
        """Returns the microjoules of every package."""
        return [int(path.read_text()) for path, _ in self._packages]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Returns the energy between two readings; a counter may have started again from zero once."""
        ranges = [limit for _, limit in self._packages]
        steps = [(late - early) % (limit + 1) for early, late, limit in zip(before, after, ranges, strict=True)]
        return sum(steps) / 1e6


class GpuCounters:
    """The energy counter of one NVIDIA GPU, through nvidia-ml-py. `note` says what it covers, or what is wrong."""

    least = GPU_SECONDS

    def __init__(self, device: str = "cuda") -> None:
        """Finds the GPU by its identity, because torch numbers visible GPUs and the driver numbers all."""
        self._library: Any = None
        try:
            import pynvml
        except ImportError:
            self.note = "a GPU's energy is read through nvidia-ml-py: pip install 'lighten[nvml]'"
            return
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(accelerator.uuid(device))
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
            self.note = f"the driver tells no energy of {device} (NVML: {error})"
            return
        self._library = pynvml
        self.note = f"{device} (NVML) while decoding at the first batch size after a prompt of one token"

    def __bool__(self) -> bool:
        return self._library is not None

    def read(self) -> list[int]:
        """Returns the millijoules since the driver was loaded."""
        return [int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device))]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Returns the energy between two readings."""
        return (after[0] - before[0]) / 1e3


def counters(device: str) -> Counters | GpuCounters:
    """Returns the counters of the processor, or of the GPU that `device` names ("cuda", "cuda:1")."""
    if device == "cpu":
        return Counters()
    return GpuCounters(device)
