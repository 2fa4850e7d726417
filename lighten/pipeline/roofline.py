"""The roofline of this machine, and the rows of results under it: roofline and cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import LightenError
from lighten.evaluate.roofline import peaks
from lighten.evaluate.roofline.cost import cost
from lighten.evaluate.roofline.peaks import Peaks
from lighten.evaluate.roofline.placing import arithmetic, point
from lighten.evaluate.settings import Evaluate
from lighten.facts import ModelFacts
from lighten.model.traffic import traffic
from lighten.pipeline.stage import Stage
from lighten.process.isolate import run_isolated
from lighten.step import Estimate, Report


def machine_peaks(device: str, report: Report, *, fresh: bool = False) -> Peaks:
    """Returns the peaks of a device of this machine: as measured before, or measured now and kept.

    Raises:
        Failure: they cannot be measured.
    """
    known = None if fresh else peaks.load(device)
    if known:
        return known
    value = run_isolated("lighten.evaluate.roofline.peaks:measure", {"device": device}, report).value
    value["bandwidth"] = [tuple(each) for each in value["bandwidth"]]
    found = Peaks(**value)
    peaks.save(found)
    return found


@dataclass
class RooflineAndCost:
    """Adds roofline and cost to rows of results, as the settings ask for."""

    evaluate: Evaluate
    watcher: Any
    known: dict[str, Peaks] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add_to(self, row: dict[str, Any], path: Path | str, facts: ModelFacts | None) -> None:
        """Puts `roofline` and `cost` into a row whose speed was measured."""
        if not row.get("speed"):
            return
        if self.evaluate.price_per_hour is not None:
            row["cost"] = cost(row["speed"], self.evaluate.price_per_hour, self.evaluate.currency)
        if not self.evaluate.roofline:
            return
        if isinstance(path, str):
            self.warnings.append(f"{row['name']}: no roofline: its weights are on a server")
        elif "server" in row.get("facts", {}):
            self.warnings.append(f"{row['name']}: no roofline: it was measured in a server")
        elif facts:
            try:
                row["roofline"] = self._roofline(row, path, facts)
            except LightenError as error:
                self.warnings.append(f"{row['name']}: no roofline: {error}")

    def _roofline(self, row: dict[str, Any], path: Path, facts: ModelFacts) -> dict[str, Any] | None:
        first = row["speed"][0]
        dtype, runtime, device = str(first.get("dtype")), str(row.get("runtime")), str(row.get("device") or "cpu")
        if device not in self.known:
            self.known[device] = self._measure(device)
        return point(
            traffic(path, facts, dtype), first, self.known[device], arithmetic(runtime, dtype, device), runtime
        )

    def _measure(self, device: str) -> Peaks:
        found = peaks.load(device)
        if found is None:
            stage = Stage("roofs of this machine", "peaks", peaks.VERSION, "peaks", {}, [], Estimate())
            begin = time.monotonic()
            found = machine_peaks(device, self.watcher.started(stage))
            self.watcher.ended(stage, time.monotonic() - begin, None)
        if found.busy:
            self.warnings.append(busy(found))
        return found

    def machine(self) -> Mapping[str, Any]:
        """Returns the peaks of the first device for `machine` in the results."""
        return next(iter(self.known.values())).facts() if self.known else {}


def busy(found: Peaks) -> str:
    """Returns the warning about peaks that were measured while other work ran."""
    return (
        f"the machine's roofs ({found.device}) were measured while it was busy: repeats took {found.spread:.0%} longer "
        "than the shortest; "
        "`lighten doctor --fresh` measures them again"
    )
