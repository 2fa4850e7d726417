"""The variants under the machine's roofline: what they need, what the machine can do, and the price of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighten.report.drawing import FRONT, GROUND, INK, MUTED, legend, sheet
from lighten.report.numbers import NOT_MEASURED, significant
from lighten.report.part import Grid, Part, Picture
from lighten.report.plots import place
from lighten.results.measured import RooflinePoint
from lighten.results.results import Results, Variant

WIDTH, HEIGHT = 360.0, 272.0
LEGEND = (
    "Each point is a measured speed: to the right, the more operations for a byte that is read; upwards, the more "
    "operations in a second. The slope is what memory can bring (dashed: the processor's caches), the level lines what "
    "matrix products reach. A point on the slope is bound by memory; one far below every line waits for something "
    "else, which `lighten evaluate --profile` looks for."
)


@dataclass(frozen=True)
class Mark:
    """One speed of a variant. `decode` is false for a prefill."""

    name: str
    decode: bool
    x: float
    y: float


@dataclass(frozen=True)
class Roofs:
    """The lines and points of the picture: GB/s of memory and caches, GFLOP/s by type of number."""

    memory: float
    cache: float | None
    peaks: dict[str, float]
    marks: tuple[Mark, ...]
    stem: str = "roofline"
    title: str = "Roofline of this machine"


def roofs(results: Results) -> Roofs | None:
    """Returns the picture; None if no variant has a place under the machine's roofline."""
    machine = results.machine
    memory, peaks, curve = (machine.get(name) for name in ("bandwidth_gb_s", "matrix_gflop_s", "bandwidth_by_size"))
    if not isinstance(memory, int | float) or not isinstance(peaks, dict):
        return None
    marks = []
    for variant in results.measured:
        if variant.roofline and not variant.elsewhere:
            for decode, at in ((True, variant.roofline), (False, variant.roofline.prefill)):
                if at:
                    marks.append(Mark(variant.name, decode, at.intensity, at.gflop_s))
    rates = {name: float(rate) for name, rate in peaks.items() if isinstance(rate, int | float)}
    sizes = curve.values() if isinstance(curve, dict) else ()
    fastest = [float(rate) for rate in sizes if isinstance(rate, int | float)]
    return Roofs(float(memory), max(fastest, default=None), rates, tuple(marks)) if marks else None


PLACES = ("Variant", "Phase", "Operations a byte", "GB/s", "GFLOP/s", "Of the roof, %", "Bound by")
PRICES = ("Variant", "A million read", "A million written", "An hour")


def roofline(results: Results, _earlier: Sequence[Results]) -> Part | None:
    """Returns the section with the picture; None if no variant has a place under the machine's roofline."""
    placed = [(each.name, each.roofline) for each in results.measured if each.roofline]
    if not placed:
        return None
    rows, notes = [], []
    for name, found in placed:
        for phase, at in (("decode", found), ("prefill", found.prefill)):
            if at:
                speeds = (significant(at.intensity, 3), significant(at.gb_s, 3), significant(at.gflop_s, 3))
                rows.append((name, phase, *speeds, f"{100 * at.share:.0f}", at.bound))
                notes += [f"{name}, {phase}: {at.note}"] if at.note else []
    drawn = roofs(results)
    pictures = (Picture(drawn.stem, drawn.title, lambda: draw_roofs(drawn), LEGEND),) if drawn else ()
    return Part("Under the roof", grids=(Grid(PLACES, tuple(rows), text=2),), pictures=pictures, notes=tuple(notes))


def cost(results: Results, _earlier: Sequence[Results]) -> Part | None:
    """Returns the section with the price of a million tokens; None if no price was given."""
    rows, notes = [], []
    for variant in results.measured:
        if found := variant.cost:
            each = found.per_million_tokens
            shown = [NOT_MEASURED if value is None else significant(value, 3) for value in (each.prefill, each.decode)]
            rows.append((variant.name, *shown, f"{found.price_per_hour:g} {found.currency}"))
            notes += [found.note] if found.note else []
    if not rows:
        return None
    return Part("What tokens cost", grids=(Grid(PRICES, tuple(rows)),), notes=tuple(dict.fromkeys(notes)))


def lines(results: Results) -> list[str]:
    """Returns a sentence for every variant: its share of the roof, what limits it, and the price of its tokens."""
    found = []
    for variant in results.measured:
        if variant.roofline:
            at = variant.roofline
            parts = [f"decode {_reached(at)}"] + ([f"prefill {_reached(at.prefill)}"] if at.prefill else [])
            found.append(f"{variant.name}: {', '.join(parts)}")
    return found


def prices(results: Results) -> list[str]:
    """Returns a sentence for every variant that has a price: a million tokens, read and written."""
    return [f"{variant.name}: {words}" for variant in results.measured if (words := price(variant))]


def price(variant: Variant) -> str:
    """Returns the price of a million tokens of a variant and what it assumes; empty if no price was given."""
    cost = variant.cost
    if cost is None:
        return ""
    each = cost.per_million_tokens
    phases = (("read", each.prefill), ("written", each.decode))
    prices = [f"{significant(value, 3)} {cost.currency} {name}" for name, value in phases if value is not None]
    note = f"; {cost.note}" if cost.note else ""
    return f"a million tokens: {', '.join(prices)} ({cost.price_per_hour:g} {cost.currency} an hour{note})"


def _reached(at: RooflinePoint) -> str:
    """Returns "24.5 GB/s (35 % of memory's peak)", or the operations if arithmetic is the limit."""
    reached = f"{significant(at.gflop_s, 3)} GFLOP/s" if at.bound == "compute" else f"{significant(at.gb_s, 3)} GB/s"
    peak = {"memory": "memory's", "cache": "the caches'", "compute": "its"}[at.bound]
    return f"{reached} ({100 * at.share:.0f} % of {peak} peak{f'; {at.note}' if at.note else ''})"


def draw_roofs(each: Roofs) -> tuple[bytes, bytes]:
    """Returns the picture as SVG and PNG, both axes logarithmic.

    Raises:
        RequestError: matplotlib is not installed.
    """
    with sheet(each.stem, each.title, (WIDTH, HEIGHT)) as drawn:
        axes = drawn.figure.add_axes((0.135, 0.145, 0.845, 0.69), facecolor="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        left, right, bottom, top = _limits(each)
        _slope(axes, each.memory, max(each.peaks.values(), default=top), (left, right), "-")
        if each.cache and each.cache > each.memory:
            _slope(axes, each.cache, max(each.peaks.values(), default=top), (left, right), (0, (4, 2)))
        for number, (name, rate) in enumerate(each.peaks.items()):
            axes.plot([rate / (each.cache or each.memory), right], [rate, rate], color=MUTED, lw=0.9, zorder=1)
            beside = right / (right / left) ** (0.19 * number)  # side by side: rates may be almost the same
            axes.text(beside, rate, f"{name} {rate:,.0f}", fontsize=7, color=MUTED, ha="right", va="bottom")
        for decode, label, style in (
            (True, "decode", {"marker": "o", "mfc": FRONT, "mec": FRONT}),
            (False, "prefill", {"marker": "^", "mfc": GROUND, "mec": INK}),
        ):
            marks = [mark for mark in each.marks if mark.decode is decode]
            if marks:
                xs, ys = [mark.x for mark in marks], [mark.y for mark in marks]
                axes.plot(xs, ys, ls="", ms=6, mew=1.1, zorder=3, label=label, **style)
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("Operations for each byte read")
        axes.set_ylabel("GFLOP/s")
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        legend(axes)
        _names(axes, each.marks, drawn.renderer)
    return drawn.svg, drawn.png


def _limits(each: Roofs) -> tuple[float, float, float, float]:
    """Returns left, right, bottom and top, with room around points and roofs."""
    xs, ys = [mark.x for mark in each.marks], [mark.y for mark in each.marks]
    peak = max([*each.peaks.values(), *ys])
    return min(xs) / 3, max([*xs, peak / each.memory]) * 3, min(ys) / 3, peak * 2.5


def _slope(axes: Any, bandwidth: float, peak: float, ends: tuple[float, float], style: Any) -> None:
    """Draws what a bandwidth allows, up to the highest peak."""
    turn = min(ends[1], peak / bandwidth)
    axes.plot([ends[0], turn], [ends[0] * bandwidth, turn * bandwidth], color=MUTED, lw=1.2, ls=style, zorder=1)
    axes.annotate(
        f"{bandwidth:,.0f} GB/s",
        (ends[0], ends[0] * bandwidth),
        xytext=(2, 18),
        textcoords="offset points",
        fontsize=7,
        color=MUTED,
    )


def _names(axes: Any, marks: Sequence[Mark], renderer: Any) -> None:
    """Writes the names of the points if there is room, decoding first."""
    names = [mark.name if len(mark.name) <= 24 else f"{mark.name[:23]}…" for mark in marks]
    sizes = []
    for name in names:
        probe = axes.text(marks[0].x, marks[0].y, name, fontsize=7.5, parse_math=False)
        box = probe.get_window_extent(renderer)
        probe.remove()
        sizes.append((box.width, box.height))
    anchors = [tuple(axes.transData.transform((mark.x, mark.y))) for mark in marks]
    area = axes.get_window_extent(renderer)
    order = sorted(range(len(marks)), key=lambda at: not marks[at].decode)
    spots = place(anchors, sizes, (area.x0, area.y0, WIDTH - 2.0, area.y1), order)
    for mark, name, anchor, spot in zip(marks, names, anchors, spots, strict=True):
        if spot:
            axes.annotate(
                name,
                (mark.x, mark.y),
                xytext=(spot[0] - anchor[0], spot[1] - anchor[1]),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7.5,
                parse_math=False,
            )
