"""What all pictures share: colours, lettering, and the way to SVG and PNG.

The same results give the same bytes. Colours are from Okabe and Ito's palette. Shapes show the same differences as
colours.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lighten.errors import missing_extra

INK, MUTED, GRID, FRONT, GROUND = "#1b1f24", "#656d76", "#e3e6ea", "#0072b2", "#ffffff"
_THEME = {INK: "--ink", MUTED: "--muted", GRID: "--rule", FRONT: "--accent", GROUND: "--ground"}


@dataclass
class Sheet:
    """A figure to draw on. Once it is finished, it has `svg` (text stays text) and `png` (200 dots per inch)."""

    figure: Any
    renderer: Any
    svg: bytes = b""
    png: bytes = b""


@contextlib.contextmanager
def sheet(stem: str, title: str, size: tuple[float, float]) -> Iterator[Sheet]:
    """Yields an empty figure with a title, of a size in points, and turns it into SVG and PNG at the end.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "matplotlib", "Drawing the plots") from error

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": f"lighten {stem}",
    }
    width, height = size
    with matplotlib.style.context("default"), matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=GROUND)
        drawn = Sheet(figure, FigureCanvasAgg(figure).get_renderer())
        figure.text(8 / width, 1 - 15 / height, title, fontsize=10.5, fontweight="bold", va="center", parse_math=False)
        yield drawn
        svg, png = io.BytesIO(), io.BytesIO()
        blank = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", metadata=blank)
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    drawn.svg, drawn.png = svg.getvalue(), png.getvalue()


def legend(axes: Any, lines: list[Any] | None = None, columns: int = 3) -> None:
    """Puts the meaning of the marks above the axes: of `lines`, or of everything that has a label."""
    named = {} if lines is None else {"handles": lines}
    axes.legend(
        **named,
        loc="lower left",
        bbox_to_anchor=(-0.15, 0.99),
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=MUTED,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def inline(svg: bytes, stem: str) -> Markup:
    """Returns an SVG for use inside a page: no prolog, unique ids, and colours from the page's variables."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{stem}-", text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text)  # matplotlib escaped the text in it
