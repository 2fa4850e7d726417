"""The sections that modules add to the report, in the order they stand in: add yours to `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lighten.report.history import history
from lighten.report.part import Part
from lighten.report.roofs import cost, roofline
from lighten.report.serving import serving
from lighten.results.results import Results

Section = Callable[[Results, Sequence[Results]], Part | None]
"""Takes the results and those of the earlier versions, oldest first; returns nothing where there is nothing to say."""

SECTIONS: tuple[Section, ...] = (roofline, serving, cost, history)


def parts(results: Results, earlier: Sequence[Results] = ()) -> list[Part]:
    """Returns the sections that have something to say."""
    return [found for section in SECTIONS if (found := section(results, earlier))]
