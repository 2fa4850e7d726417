"""The Pareto front of points."""

from __future__ import annotations

import math
from collections.abc import Sequence

Interval = tuple[float, float]
"""Low and high end."""


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other point dominates, by rising first coordinate.

    Smaller is better in both coordinates; negate a coordinate that should be large. One point dominates another if it
    is nowhere worse and somewhere better. So equal points stay together.
    """
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if points[index][1] < best or (front and points[index] == points[front[-1]]):
            front.append(index)
            best = points[index][1]
    return front


def sure_front(points: Sequence[tuple[float, float]], spans: Sequence[tuple[Interval, Interval]]) -> list[int]:
    """Returns the points of the front that are certainly on it: each is better than the next in one coordinate.

    If the intervals of two neighbours overlap in one coordinate, the point that is better in the other coordinate
    stays. If they overlap in both, the two cannot be distinguished, and both stay.

    Args:
        points: smaller is better in both coordinates.
        spans: of every point, the intervals of both coordinates.
    """
    kept: list[int] = []
    for index in pareto(points):
        if not any(_beats(spans[other], spans[index]) for other in kept):
            kept = [other for other in kept if not _beats(spans[index], spans[other])] + [index]
    return kept


def _beats(ours: tuple[Interval, Interval], theirs: tuple[Interval, Interval]) -> bool:
    """Whether the first is certainly better in one coordinate, and not certainly worse in the other."""
    better = [mine[1] < other[0] for mine, other in zip(ours, theirs, strict=True)]
    worse = [mine[0] > other[1] for mine, other in zip(ours, theirs, strict=True)]
    return any(better) and not any(worse)
