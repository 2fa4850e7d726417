"""A section that a module adds to the report: words, grids and pictures, for the page and for Markdown alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Grid:
    """A table of text. The first column names the rows. `text` counts the columns that are not numbers.

    `sparks` are drawings, one for every row, that follow the name. Only the page has them.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text: int = 1
    sparks: tuple[Markup, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture under plots/: `draw` returns it as SVG and PNG, or raises RequestError without matplotlib."""

    stem: str
    title: str
    draw: Callable[[], tuple[bytes, bytes]]
    caption: str = ""


@dataclass(frozen=True)
class Part:
    """A section: its heading, a sentence, grids, pictures, and notes under them."""

    title: str
    intro: str = ""
    grids: tuple[Grid, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
