"""Energy of the processor packages, read from Linux's RAPL counters."""

from __future__ import annotations

from pathlib import Path

RAPL = Path("/sys/class/powercap")


class Counters:
    """The energy counters of all packages; `note` says why there are none to read, or what they cover."""

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
