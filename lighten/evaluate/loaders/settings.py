"""Opening an artifact with every loader: key, prediction and columns of a row."""

from __future__ import annotations

from typing import Any

from lighten.evaluate.loaders import survey
from lighten.evaluate.measurement import FIXED_BYTES, Measurement
from lighten.facts import TASKS, ModelFacts
from lighten.step import Estimate


class Loaders(Measurement):
    """Opening the artifact with every loader that reads its format. There are no settings."""

    name = "loaders"
    work = "lighten.evaluate.loaders.work:measure"
    isolated = False
    tasks = TASKS

    def packages(self, of_runtime: tuple[str, ...] = ()) -> dict[str, str]:
        """Returns the versions of all packages that may decide whether something loads."""
        return survey.packages()

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of two loaders: each reads every weight, and may unpack it."""
        peak = FIXED_BYTES + 100_000_000 + 3 * facts.params
        return Estimate(seconds=6 + 4e-8 * facts.params, peak_bytes=peak, disk_bytes=10_000)

    def device_bytes(self, facts: ModelFacts, width: int) -> int:
        """Returns nothing. A loader that the device cannot hold is a row that says so."""
        return 0

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the answer of every loader into a row."""
        row["loads"] = result["loads"]
