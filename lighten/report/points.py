"""The text that a point of a plot shows under the mouse or the keyboard's focus."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from lighten.report.table import Table

HIGHEST_RANK = 6
"""Highest rank of a column whose number a point shows; a narrow terminal keeps the same columns."""
REACH = 11
"""Radius around a mark, in points, that counts as the mark."""

Figures = list[tuple[str, str]]
"""Label and text of each number."""

_POINT = re.compile(r'<g id="[^"]*?point-(\d+)">((?:(?!<g id=).)*?<use [^>]*?x="([\d.]+)" y="([\d.]+)")', re.DOTALL)


def figures(table: Table) -> dict[str, Figures]:
    """Returns the numbers that a point shows, by variant: titles of the foremost columns, and texts with units."""
    return {
        row.variant.name: [
            (column.title, cell.with_unit(column.unit))
            for column, cell in zip(table.columns, row.cells, strict=False)
            if 0 < column.rank <= HIGHEST_RANK and cell.value is not None
        ]
        for row in table.rows
    }


def lively(svg: Markup, names: Sequence[str], numbers: Mapping[str, Figures]) -> Markup:
    """Returns an inlined plot whose points can get the focus, and show their name and numbers.

    The words are in a title, which every browser shows. The page's script makes them a box.

    Args:
        svg: the plot.
        names: the variants, in the order of the points' ids.
        numbers: label and text of each number, by variant.
    """

    def point(found: re.Match[str]) -> str:
        name = names[int(found[1])]
        lines = "\n".join([name, *(f"{label}: {text}" for label, text in numbers.get(name, []))])
        opened = f'<g id="{found[0].split(chr(34))[1]}" class="point" tabindex="0" role="img" '
        opened += f'aria-label="{escape(lines)}" data-name="{escape(name)}">'
        reach = f'<circle cx="{found[3]}" cy="{found[4]}" r="{REACH}" fill="transparent"/>'
        return f"{opened}<title>{escape(lines)}</title>{reach}{found[2]}"

    return Markup(_POINT.sub(point, svg))  # nothing but what is escaped above was put in
