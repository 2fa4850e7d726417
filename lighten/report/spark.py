"""A line plot as small as a word, drawn by hand. It has no axes, and its points show their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup

WIDTH, HEIGHT, EDGE = 132.0, 34.0, 9.0


class Number(Protocol):
    """A number of a version: its value, its text, and why it cannot be compared with the number before."""

    @property
    def version(self) -> str:
        """Name of the version."""

    @property
    def value(self) -> float | None:
        """Value; None if there is none."""

    @property
    def text(self) -> str:
        """Text of the value."""

    @property
    def why(self) -> str:
        """Reason why it stands apart from the number before; empty if it does not."""


def spark(name: str, heading: str, line: Sequence[Number]) -> Markup:
    """Returns an SVG of one variant's numbers by version. Two numbers that were not measured alike are not joined."""
    known = [(at, point.value, point) for at, point in enumerate(line) if point.value is not None]
    low, high = min(value for _, value, _ in known), max(value for _, value, _ in known)
    step = (WIDTH - 2 * EDGE) / max(1, len(line) - 1)

    def spot(at: int, value: float) -> tuple[float, float]:
        rise = (value - low) / (high - low) if high > low else 0.5
        return EDGE + step * at, HEIGHT - EDGE - rise * (HEIGHT - 2 * EDGE)

    runs: list[list[tuple[float, float]]] = []
    for at, value, point in known:
        if point.why or not runs:
            runs.append([])
        runs[-1].append(spot(at, value))
    drawn = [Markup('<polyline points="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y in run)) for run in runs]
    for at, value, point in known:
        x, y = spot(at, value)
        words = f"{name} in {point.version}\n{heading}: {point.text}"
        words += f"\nNot to be compared with the version before: {point.why}" if point.why else ""
        mark = Markup(
            '<g class="point" tabindex="0" role="img" aria-label="{words}" data-name="{name}"><title>{words}</title>'
            '<circle cx="{x}" cy="{y}" r="8" fill="transparent"/>'
            '<circle class="dot{apart}" cx="{x}" cy="{y}" r="2.6"/></g>'
        )
        apart = " apart" if point.why else ""
        drawn.append(mark.format(words=words, name=name, x=f"{x:.1f}", y=f"{y:.1f}", apart=apart))
    frame = Markup('<svg class="spark" viewBox="0 0 {} {}" width="{}" height="{}">{}</svg>')
    return frame.format(WIDTH, HEIGHT, WIDTH, HEIGHT, Markup("").join(drawn))
