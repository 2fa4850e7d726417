"""Quality against size, and quality against decode speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lighten.report import claims
from lighten.report.drawing import FRONT, GROUND, INK, MUTED, legend, sheet
from lighten.report.numbers import byte_unit
from lighten.report.pareto import Interval, sure_front
from lighten.results.results import Results, Variant

WIDTH, HEIGHT = 360.0, 272.0
"""Size of a figure in points."""

OFF_SCALE = 4.0
"""Multiple of the best perplexity above which a point is left out of the plots. It would flatten all other points."""

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""


@dataclass(frozen=True)
class Point:
    """One variant in a plot."""

    name: str
    x: float
    y: float
    baseline: bool
    x_span: Interval | None = None
    """Interval of x; None for a number that is known exactly."""
    y_span: Interval | None = None
    doubt: str = ""
    """Reason why the point is compared with no other point; empty if there is none."""

    def spans(self, sign: float) -> tuple[Interval, Interval]:
        """Intervals of both coordinates, the first multiplied by a sign."""
        low, high = sorted(sign * end for end in self.x_span or (self.x, self.x))
        return (low, high), self.y_span or (self.y, self.y)


@dataclass(frozen=True)
class Plot:
    """The content of a plot. `larger` is true if a larger x is better. A smaller y is always better."""

    stem: str
    title: str
    x_label: str
    larger: bool
    points: tuple[Point, ...]
    left_out: tuple[Point, ...] = ()
    """Points whose perplexity is off the scale."""

    def front(self) -> list[int]:
        """Returns the indices of the points that no other point certainly beats, from left to right."""
        sign = -1.0 if self.larger else 1.0
        sure = [i for i, point in enumerate(self.points) if not point.doubt]
        some = [self.points[i] for i in sure]
        best = sure_front([(sign * point.x, point.y) for point in some], [point.spans(sign) for point in some])
        return sorted((sure[i] for i in best), key=lambda i: (self.points[i].x, self.points[i].y, i))


def plots(results: Results) -> list[Plot]:
    """Returns the plots for which at least two variants have the numbers."""
    unit, scale = byte_unit(variant.size_bytes for variant in results.measured)
    sizes, speeds = [], []
    for v in results.measured:
        ppl = claims.perplexity(results, v)
        if ppl is None:
            continue
        point = Point(v.name, 0.0, ppl.value, v is results.baseline, None, _span(results, v, ppl.value))
        point = replace(point, doubt="better than its source" if claims.too_good(results, v) else "")
        if v.size_bytes:
            sizes.append(replace(point, x=v.size_bytes / scale))
        if v.decode_tok_s:
            doubt = point.doubt or ("repeats differ" if claims.noisy(v.speed[0]) else "")
            speeds.append(replace(point, x=v.decode_tok_s, x_span=claims.ends(v.speed[0]), doubt=doubt))
    found = [
        _plot("quality-size", "Perplexity against size", f"Size, {unit} (smaller is better)", False, sizes),
        _plot("quality-speed", "Perplexity against decode speed", "Decode, tok/s (larger is better)", True, speeds),
    ]
    return [plot for plot in found if len(plot.points) > 1]


def _span(results: Results, variant: Variant, value: float) -> Interval:
    """Returns the interval of a perplexity beside the baseline's: that of the paired change, which is narrower."""
    rise, span = claims.rise(results, variant), claims.rise_ends(results, variant)
    if rise is None or span is None:
        return value, value
    reference = value / (1 + rise.relative) if rise.relative > -1 else value
    return reference * (1 + span[0]), reference * (1 + span[1])


def _plot(stem: str, title: str, x_label: str, larger: bool, points: list[Point]) -> Plot:
    """Returns a plot of the points that are on the scale, with the names of the points that are not."""
    limit = OFF_SCALE * min((point.y for point in points), default=0.0)
    shown = tuple(point for point in points if point.y <= limit)
    return Plot(stem, title, x_label, larger, shown, tuple(point for point in points if point.y > limit))


def draw(plot: Plot) -> tuple[bytes, bytes]:
    """Returns the plot as SVG and PNG.

    Raises:
        RequestError: matplotlib is not installed.
    """
    with sheet(plot.stem, plot.title, (WIDTH, HEIGHT)) as drawn:
        axes = drawn.figure.add_axes((0.135, 0.145, 0.845, 0.69), facecolor="none")
        _points(axes, plot)
        _scales(axes, plot)
        _labels(axes, plot, drawn.renderer)
    return drawn.svg, drawn.png


def _points(axes: Any, plot: Plot) -> None:
    """Draws the front as a staircase, then its points filled, all other points hollow, the baseline as a diamond.

    A cross is a point that nothing is claimed of.
    """
    front = plot.front()
    on = [plot.points[i] for i in front]
    steps = "steps-pre" if plot.larger else "steps-post"
    axes.plot([p.x for p in on], [p.y for p in on], drawstyle=steps, color=FRONT, lw=1, ls=(0, (4, 2)), zorder=2)
    styles: list[tuple[str, list[Point], dict[str, Any]]] = [
        ("on the Pareto front", [p for p in on if not p.baseline], {"marker": "o", "mfc": FRONT, "mec": FRONT}),
        (
            "not on it",
            [p for i, p in enumerate(plot.points) if i not in front and not p.baseline and not p.doubt],
            {"marker": "o", "mfc": GROUND, "mec": MUTED},
        ),
        (
            "not compared",
            [p for p in plot.points if p.doubt and not p.baseline],
            {"marker": "x", "mfc": GROUND, "mec": MUTED},
        ),
        ("baseline", [p for p in plot.points if p.baseline], {"marker": "D", "mfc": INK, "mec": INK, "ms": 5.5}),
    ]
    for label, points, style in styles:
        for n, p in enumerate(points):  # each with an id of its own, so that the page can say its figures
            drawn = {"ls": "", "ms": 6.5, "mew": 1.2, "zorder": 3, "label": "" if n else label, **style}
            axes.plot([p.x], [p.y], gid=f"point-{plot.points.index(p)}", **drawn)
    legend(axes, columns=4)


def _scales(axes: Any, plot: Plot) -> None:
    """Sets margins, labels and ticks. Values that span more than a factor of four get a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for axis, values in ((axes.xaxis, [p.x for p in plot.points]), (axes.yaxis, [p.y for p in plot.points])):
        wide = min(values) > 0 and max(values) / min(values) > 4
        set_scale, set_limits = (
            (axes.set_xscale, axes.set_xlim) if axis is axes.xaxis else (axes.set_yscale, axes.set_ylim)
        )
        if wide:
            set_scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(5))
        set_limits(*_limits(min(values), max(values), wide))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel("Perplexity (smaller is better)")
    axes.grid(True)
    axes.tick_params(length=0, which="both")
    axes.set_axisbelow(True)


def _limits(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    """Returns limits with a seventh of the span free at both ends."""
    if logarithmic:
        margin = (high / low) ** (1 / 7)
        return low / margin, high * margin
    margin = (high - low) / 7 or abs(high) / 20 or 1.0
    return low - margin, high + margin


def _labels(axes: Any, plot: Plot, renderer: Any) -> None:
    """Writes each point's name where it covers no other name and no point. Without such a place it is left out."""
    names = [point.name if len(point.name) <= 28 else f"{point.name[:27]}…" for point in plot.points]
    sizes = []
    for name in names:
        probe = axes.text(0, 0, name, fontsize=8.5, parse_math=False)
        box = probe.get_window_extent(renderer)
        probe.remove()
        sizes.append((box.width, box.height))
    anchors = [tuple(axes.transData.transform((point.x, point.y))) for point in plot.points]
    area = axes.get_window_extent(renderer)
    front = plot.front()
    first = [*front, *(i for i, point in enumerate(plot.points) if point.baseline and i not in front)]
    order = [*first, *(i for i in range(len(anchors)) if i not in first)]
    line = _staircase([anchors[i] for i in front], plot.larger)
    spots = place(anchors, sizes, (area.x0, area.y0, WIDTH - 2.0, area.y1), order, line)
    for point, name, anchor, spot, size in zip(plot.points, names, anchors, spots, sizes, strict=True):
        if spot is None:
            continue
        offset = (spot[0] - anchor[0], spot[1] - anchor[1])
        far = math.hypot(max(0.0, abs(offset[0]) - size[0] / 2), max(0.0, abs(offset[1]) - size[1] / 2)) > 14
        axes.annotate(
            name,
            (point.x, point.y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 5} if far else None,
        )


def _staircase(corners: Sequence[tuple[float, float]], larger: bool) -> list[tuple[float, float]]:
    """Returns points along the front's line, a few points apart, for labels to keep off."""
    line: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        turn = (x0, y1) if larger else (x1, y0)
        for a, b in (((x0, y0), turn), (turn, (x1, y1))):
            count = max(1, int(math.dist(a, b) / 4))
            line += [(a[0] + (b[0] - a[0]) * i / count, a[1] + (b[1] - a[1]) * i / count) for i in range(count)]
    return line


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    order: Sequence[int],
    avoid: Sequence[tuple[float, float]] = (),
) -> list[tuple[float, float] | None]:
    """Returns a centre for each label: near its anchor, inside `area`, off every anchor and every other label.

    The search is greedy. In `order`, each label takes the cheapest free place of some rings around its anchor. A label
    that finds none gets None. `avoid` are places that are better left free.
    """
    taken: list[Box] = []
    spots: list[tuple[float, float] | None] = [None] * len(anchors)
    marks = [_box(anchor, (10.0, 10.0)) for anchor in anchors]
    lines = [_box(point, (2.0, 2.0)) for point in avoid]
    for i in order:
        (x, y), (width, height) = anchors[i], sizes[i]
        best = math.inf
        for gap in (7.0, 14.0, 24.0):
            for turn in range(16):
                angle = math.pi / 4 + turn * math.pi / 8
                spot = (
                    x + math.cos(angle) * gap + _lean(math.cos(angle)) * width / 2,
                    y + math.sin(angle) * gap + _lean(math.sin(angle)) * height / 2,
                )
                box = _box(spot, (width + 4, height + 2))
                inside = area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]
                if not inside or any(_overlap(box, other) for other in [*taken, *marks]):
                    continue
                cost = gap + 0.1 * turn + sum(_overlap(box, line) for line in lines)
                if cost < best:
                    best, spots[i] = cost, spot
        if (chosen := spots[i]) is not None:
            taken.append(_box(chosen, sizes[i]))
    return spots


def _lean(direction: float) -> float:
    """Returns -1, 0 or 1: the side of the anchor on which the label's box lies."""
    return 0.0 if abs(direction) < 0.3 else math.copysign(1.0, direction)


def _box(centre: tuple[float, float], size: tuple[float, float]) -> Box:
    (x, y), (width, height) = centre, size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    """Returns the area two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
