"""What a point of a plot says to whoever hovers over it, or comes to it with the keyboard."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from lighten.report.table import Table

TOLD = 6
"""Columns up to this rank are told: those that a narrow terminal would keep."""
REACH = 11
"""Radius around a mark, in points, that counts as the mark."""

Figures = list[tuple[str, str]]
"""Label and text of each number."""

_POINT = re.compile(r'<g id="[^"]*?point-(\d+)">((?:(?!<g id=).)*?<use [^>]*?x="([\d.]+)" y="([\d.]+)")', re.DOTALL)


def figures(table: Table) -> dict[str, Figures]:
    """Returns what is told of each variant: the title and the text, with its unit, of its foremost columns."""
    return {
        row.variant.name: [
            (column.title, cell.told(column.unit))
            for column, cell in zip(table.columns, row.cells, strict=False)
            if 0 < column.rank <= TOLD and cell.value is not None
        ]
        for row in table.rows
    }


def lively(svg: Markup, names: Sequence[str], told: Mapping[str, Figures]) -> Markup:
    """Returns an inlined plot whose points can be come to, and say their name and figures; `names` by the points' ids.

    The words are in a title, which every browser shows; the page's script makes them a box.
    """

    def point(found: re.Match[str]) -> str:
        name = names[int(found[1])]
        lines = "\n".join([name, *(f"{label}: {text}" for label, text in told.get(name, []))])
        opened = f'<g id="{found[0].split(chr(34))[1]}" class="point" tabindex="0" role="img" '
        opened += f'aria-label="{escape(lines)}" data-name="{escape(name)}">'
        reach = f'<circle cx="{found[3]}" cy="{found[4]}" r="{REACH}" fill="transparent"/>'
        return f"{opened}<title>{escape(lines)}</title>{reach}{found[2]}"

    return Markup(_POINT.sub(point, svg))  # nothing but what is escaped above was put in
