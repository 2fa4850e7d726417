"""Where the variants load: a row for each variant, a column for each loader, and the failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lighten.report.numbers import NOT_MEASURED, duration
from lighten.results.measured import Load
from lighten.results.results import Results

LEGEND = (
    "✓ opened the artifact in a process of its own and computed logits, in the time beside it; ✗ tried and failed; "
    f"{NOT_MEASURED} does not read such a format."
)


@dataclass(frozen=True)
class Matrix:
    """A column for every loader, as (name, version), and a row for every variant that was tried."""

    loaders: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Load, ...]], ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences: one for every failure, and one for every loader that is not installed."""
        cells = [(name, load) for name, loads in self.rows for load in loads]
        failed = [f"{name} with {load.loader}: {load.error}" for name, load in cells if load.status == "failed"]
        absent = [f"{load.loader} {load.error}" for _, load in cells if load.status == "absent"]
        return (*failed, *dict.fromkeys(absent))

    def used(self) -> Matrix:
        """Returns the columns of the loaders that read any of the formats."""
        kept = [at for at in range(len(self.loaders)) if any(loads[at].status != "other" for _, loads in self.rows)]
        return Matrix(
            tuple(self.loaders[at] for at in kept),
            tuple((name, tuple(loads[at] for at in kept)) for name, loads in self.rows),
        )


def matrix(results: Results) -> Matrix | None:
    """Returns the matrix, or None if nothing was tried."""
    tried = [(variant.name, variant.loads) for variant in results.variants if variant.loads]
    names = dict.fromkeys(load.loader for _, loads in tried for load in loads)
    if not names:
        return None
    rows = []
    for variant, loads in tried:
        by_name = {load.loader: load for load in loads}
        rows.append((variant, tuple(by_name.get(name, Load(loader=name, status="other")) for name in names)))
    return Matrix(tuple((name, _versions(name, rows)) for name in names), tuple(rows))


def _versions(name: str, rows: Sequence[tuple[str, tuple[Load, ...]]]) -> str:
    found = dict.fromkeys(load.version for _, loads in rows for load in loads if load.loader == name and load.version)
    return " and ".join(found)


def mark(load: Load) -> str:
    """Returns the text of a cell: "✓ 1.2 s", "✗ failed", "not installed", or a dash."""
    if load.status == "ok":
        return "✓" if load.seconds is None else f"✓ {duration(load.seconds)}"
    return {"failed": "✗ failed", "absent": "not installed", "other": NOT_MEASURED}[load.status]
