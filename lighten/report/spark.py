"""A line plot as small as a word, drawn by hand: it has no axes, and its points say their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup

WIDTH, HEIGHT, EDGE = 132.0, 34.0, 9.0


class Said(Protocol):
    """A number of a version, in words too, and why it is not to be compared with the one before."""

    @property
    def version(self) -> str:
        """Whose number it is."""

    @property
    def value(self) -> float | None:
        """The number, None if there is none."""

    @property
    def text(self) -> str:
        """How it is written."""

    @property
    def why(self) -> str:
        """Why it is apart; nothing if it is not."""


def spark(name: str, heading: str, line: Sequence[Said]) -> Markup:
    """Returns an SVG of one variant's numbers by version; a gap is left where two were not measured alike."""
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
