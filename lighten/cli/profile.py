"""The output of `lighten evaluate --profile` for a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

SHOWN = 8


def shown(name: str, found: dict[str, Any], folder: Path) -> Iterator[RenderableType]:
    """Yields the largest operators of each phase, and the bottleneck that they point to."""
    for phase in found["phases"]:
        plain = found["plain_seconds"][phase["name"]]
        slower = phase["seconds"] / plain
        yield Text(
            f"\n{name}, {phase['name']}: {1000 * plain:.1f} ms, with the profiler {slower:.2g} times that", style="bold"
        )
        grid = Table(box=None, pad_edge=False, header_style="dim")
        grid.add_column("Operator", overflow="fold")
        grid.add_column("For")
        for title in ("Calls", "ms", "%"):
            grid.add_column(title, justify="right")
        for each in phase["operators"][:SHOWN]:
            times = f"{1000 * each['seconds']:.2f}", f"{100 * each['share']:.1f}"
            grid.add_row(each["name"], each["kind"], f"{each['calls']:,}", *times)
        yield grid
        yield Text(f"{phase['verdict']}: {phase['why']}. {phase['advice'][0].upper()}{phase['advice'][1:]}.")
    yield Text(f"trace: {folder / found['trace']} (open it at ui.perfetto.dev)", style="dim")
