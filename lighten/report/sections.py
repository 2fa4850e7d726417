"""The sections that modules add to the report, in their order. To add a section, add it to `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lighten.report.history import history
from lighten.report.part import Part
from lighten.report.roofs import cost, roofline
from lighten.report.serving import serving
from lighten.results.results import Results

Section = Callable[[Results, Sequence[Results]], Part | None]
"""Function of the results and of earlier versions (oldest first) that returns a part, or None."""

SECTIONS: tuple[Section, ...] = (roofline, serving, cost, history)


def parts(results: Results, earlier: Sequence[Results] = ()) -> list[Part]:
    """Returns the sections that are not empty."""
    return [found for section in SECTIONS if (found := section(results, earlier))]
