"""The comparison of all variants, made once for the terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lighten.report import claims
from lighten.report.calibration import overlaps
from lighten.report.cell import Cell, Column
from lighten.report.columns import columns
from lighten.report.serving import doubts
from lighten.results.results import Results, Variant


@dataclass(frozen=True)
class Row:
    """One variant. A failed variant has no cells but a reason."""

    variant: Variant
    cells: tuple[Cell, ...] = ()
    baseline: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The rows: the baseline first, then all variants in the order of the recipe, failed ones last."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    """Titles of the columns for which nothing was measured; they are left out."""
    notes: tuple[str, ...] = ()
    """Doubts about the numbers, which stand directly under the table."""


def table(results: Results) -> Table:
    """Returns the comparison of all variants. The best value of a column is marked; the baseline is left out of it."""
    base = results.baseline
    order = [*([base] if base else []), *(v for v in results.measured if v is not base)]
    everything = columns(results)
    grid = [[column.cell(variant) for column in everything] for variant in order]
    used = [i for i, column in enumerate(everything) if _used(column, [cells[i] for cells in grid])]
    for i in used:
        _mark_best(everything[i], grid, i, start=1 if base else 0)
    rows = [
        Row(variant, tuple(cells[i] for i in used), baseline=variant is base)
        for variant, cells in zip(order, grid, strict=True)
    ]
    failed = [Row(v, baseline=v.name == "baseline", reason=v.error or "") for v in results.variants if v.failed]
    missing = tuple(column.title for i, column in enumerate(everything) if i not in used)
    return Table(
        tuple(everything[i] for i in used),
        (*rows, *failed),
        missing,
        (*overlaps(results), *claims.doubts(results), *doubts(results)),
    )


def _used(column: Column, cells: list[Cell]) -> bool:
    return column.name == "variant" or any(cell.value is not None for cell in cells)


def _mark_best(column: Column, grid: list[list[Cell]], i: int, *, start: int) -> None:
    """Marks the best cell of a column and the cells that are equally good. If all are, none is marked."""
    cells = [row[i] for row in grid[start:]]
    known = [(cell.value, cell) for cell in cells if isinstance(cell.value, float)]
    if not column.better or len(known) < 2:
        return
    value, best = (min if column.better == "lower" else max)(known, key=lambda pair: pair[0])
    if not best.holds:  # who is the best is not known
        return
    as_good = [
        cell
        for v, cell in known
        if cell.holds and (cell.text == best.text or abs(v - value) <= best.margin + cell.margin)
    ]
    if len(as_good) < len(known):
        for row in grid[start:]:
            if any(row[i] is cell for cell in as_good):
                row[i] = replace(row[i], best=True)


def first_line(reason: str) -> str:
    """Returns the first line of a reason, for places with room for one line."""
    return next((line.strip() for line in reason.splitlines() if line.strip()), "")
