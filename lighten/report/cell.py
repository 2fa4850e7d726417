"""A cell and a column of the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lighten.report.numbers import NOT_MEASURED, significant
from lighten.results.results import Variant


@dataclass(frozen=True)
class Cell:
    """The content of one cell: the number, its qualifications, and the value to sort by.

    Two values are equally good if their intervals (`value` ± `margin`) meet. Nothing is claimed of a value that does
    not `hold`.
    """

    text: str = NOT_MEASURED
    details: tuple[str, ...] = ()
    value: float | str | None = None
    margin: float = 0.0
    holds: bool = True
    best: bool = False

    @property
    def line(self) -> str:
        """The cell on one line: intervals as they are, other details in brackets."""
        return self.with_unit("")

    def with_unit(self, unit: str) -> str:
        """The cell on one line with its unit, such as "145 MB (53 %)"."""
        parts = [self.text, unit, *(d if d[0] in "±[Δ" else f"({d})" for d in self.details)]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Column:
    """One column. `rank` orders the columns that a narrow terminal keeps; `about` explains the column."""

    name: str
    title: str
    unit: str
    better: Literal["lower", "higher", ""]
    rank: int
    about: str
    cell: Callable[[Variant], Cell]


def plain(value: float | None, digits: int) -> Cell:
    """Returns the cell of a number with significant digits; a dash if there is no number."""
    return Cell() if value is None else Cell(significant(value, digits), (), float(value))
