"""How many bits each tensor of a variant got: a grid of modules and layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lighten.report.drawing import GRID, INK, MUTED, Sheet, sheet
from lighten.report.numbers import significant
from lighten.results.measured import Free, Section
from lighten.results.results import Results, Variant

ORDER = ("q", "k", "v", "o", "gate", "up", "down")
"""Rows that come first. All further rows follow by name."""

WIDTH, LABELS, BESIDE = 900.0, 64.0, 190.0
"""Points: the whole picture, the names of the rows, and the room for tensors outside the layers."""
ROW, TOP, LINE = 18.0, 32.0, 17.0
NARROW = 15.0
"""Width in points below which a cell has no room for its number."""
# not the page's colours: a cell is as light in the dark
_ON_DARK, _ON_LIGHT = "#fdfdfd", "#101214"

_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+?)(?:\.weight)?$")


class Allocated(Section):
    """The type that one tensor is stored in, and its bits per weight, scales included."""

    type: str
    bits: float


@dataclass(frozen=True)
class StorageType:
    """A storage type, the bits per weight of its tensors, and their number."""

    type: str
    low: float
    high: float
    count: int

    @property
    def line(self) -> str:
        """Text such as "Q4_K, 4.5 bits, 120 tensors"."""
        ends = list(dict.fromkeys(significant(bits, 3, decimals=2) for bits in (self.low, self.high)))
        name = "" if self.type in (f"{end} bits" for end in ends) else f"{self.type}, "
        return f"{name}{'–'.join(ends)} bits, {self.count:,} tensor{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Allocation:
    """The allocation of one variant: `cells` by (module, layer), and the tensors `beside` the layers by name."""

    variant: str
    stem: str
    cells: dict[tuple[str, int], Allocated]
    beside: dict[str, Allocated]

    @property
    def title(self) -> str:
        """Title of the picture."""
        return f"Bits by layer and module: {self.variant}"

    @property
    def modules(self) -> list[str]:
        """Modules, which are the rows."""
        names = {module for module, _ in self.cells}
        return [name for name in ORDER if name in names] + sorted(names - set(ORDER))

    @property
    def layers(self) -> range:
        """Layers, which are the columns."""
        numbers = [layer for _, layer in self.cells]
        return range(min(numbers, default=0), max(numbers, default=-1) + 1)

    @property
    def types(self) -> list[StorageType]:
        """The storage types, fewest bits first."""
        bits: dict[str, list[float]] = {}
        for each in (*self.cells.values(), *self.beside.values()):
            bits.setdefault(each.type, []).append(each.bits)
        found = [StorageType(name, min(values), max(values), len(values)) for name, values in bits.items()]
        return sorted(found, key=lambda each: (each.low + each.high, each.type))


def allocated(facts: Free) -> dict[str, Allocated] | None:
    """Returns the fact `allocation` by tensor; None if it is absent or has another shape."""
    try:
        return TypeAdapter(dict[str, Allocated]).validate_python(facts.get("allocation")) or None
    except ValidationError:
        return None


def allocations(results: Results) -> list[Allocation]:
    """Returns the allocation of every variant that has one."""
    return [found for variant in results.measured if (found := _allocation(variant))]


def _allocation(variant: Variant) -> Allocation | None:
    tensors = allocated(variant.facts)
    if tensors is None:
        return None
    cells, beside = {}, {}
    for name, what in tensors.items():
        if found := _IN_LAYER.search(name):
            cells[found[2].rpartition(".")[2].removesuffix("_proj"), int(found[1])] = what
        else:
            beside[name.removesuffix(".weight")] = what
    return Allocation(variant.name, "bits-" + re.sub(r"[^A-Za-z0-9._-]", "-", variant.name), cells, beside)


def draw_allocation(allocation: Allocation) -> tuple[bytes, bytes]:
    """Returns the grid as SVG and PNG. Darker is more bits; a cell says how many if there is room.

    Raises:
        RequestError: matplotlib is not installed.
    """
    legend = 1 + (len(allocation.types) - 1) // 4
    rows = max(len(allocation.modules), len(allocation.beside), 1)
    height = TOP + LINE * legend + 10 + ROW * rows + 34
    with sheet(allocation.stem, allocation.title, (WIDTH, height)) as drawn:
        axes = drawn.figure.add_axes((0, 0, 1, 1), facecolor="none")
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)
        colours = _colours(allocation.types)
        _legend(axes, drawn, allocation.types, colours)
        _grid(axes, allocation, colours, TOP + LINE * legend + 10)
    return drawn.svg, drawn.png


def _colours(types: list[StorageType]) -> dict[str, tuple[float, float, float]]:
    """Returns a colour for every type, evenly spaced. More bits are darker."""
    from matplotlib import colormaps

    scale, last = colormaps["Blues"], max(1, len(types) - 1)
    return {each.type: scale(0.2 + 0.75 * i / last)[:3] for i, each in enumerate(types)}


def _legend(axes: Any, drawn: Sheet, types: list[StorageType], colours: dict[str, Any]) -> None:
    x, y = 8.0, TOP + LINE / 2
    for each in types:
        label = axes.text(x + 15, y, each.line, fontsize=8.5, color=MUTED, va="center", parse_math=False)
        width = label.get_window_extent(drawn.renderer).width + 33
        if x > 8 and x + width > WIDTH:
            x, y = 8.0, y + LINE
            label.set_position((x + 15, y))
        _cell(axes, x, y - 5, 10, 10, colours[each.type])
        x += width


def _grid(axes: Any, allocation: Allocation, colours: dict[str, Any], top: float) -> None:
    right = WIDTH - (BESIDE if allocation.beside else 8.0)
    width = min(34.0, (right - LABELS) / max(1, len(allocation.layers)))
    for row, module in enumerate(allocation.modules):
        y = top + ROW * row
        axes.text(LABELS - 8, y + ROW / 2, module[-12:], fontsize=8.5, ha="right", va="center", parse_math=False)
        for column, layer in enumerate(allocation.layers):
            x = LABELS + width * column
            if what := allocation.cells.get((module, layer)):
                _cell(axes, x, y, width, ROW, colours[what.type], what.bits if width >= NARROW else None)
            else:
                axes.plot([x + width / 2], [y + ROW / 2], marker=".", ms=2, color=GRID)
    bottom = top + ROW * len(allocation.modules)
    for column, layer in _ticks(allocation.layers, width):
        x = LABELS + width * (column + 0.5)
        axes.text(x, bottom + 9, str(layer), fontsize=7.5, color=MUTED, ha="center", va="center")
    if allocation.layers:
        axes.text(LABELS, bottom + 23, "Layer", fontsize=8.5, color=MUTED, va="center")
    for row, (name, what) in enumerate(allocation.beside.items()):
        x, y = LABELS + width * len(allocation.layers) + 22, top + ROW * row
        _cell(axes, x, y, 24, ROW, colours[what.type], what.bits)
        label = name.removeprefix("model.")
        axes.text(x + 31, y + ROW / 2, label[-24:], fontsize=8.5, color=INK, va="center", parse_math=False)


def _ticks(layers: range, width: float) -> Iterator[tuple[int, int]]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * width >= NARROW)
    return ((column, layer) for column, layer in enumerate(layers) if layer % step == 0)


def _cell(
    axes: Any, x: float, y: float, width: float, height: float, colour: tuple[float, ...], bits: float | None = None
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x + 0.5, y + 0.5), width - 1, height - 1, facecolor=colour, linewidth=0))
    if bits is not None:
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = _ON_LIGHT if light > 0.5 else _ON_DARK
        number = significant(bits, 2, decimals=1)
        axes.text(x + width / 2, y + height / 2, number, fontsize=6.5, color=ink, ha="center", va="center")
