"""The trade-offs worth looking at."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other point dominates, by rising first coordinate.

    Smaller is better in both coordinates (negate what should be large). One point dominates another if it
    is nowhere worse and somewhere better, so equal points stay together.
    """
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if points[index][1] < best or (front and points[index] == points[front[-1]]):
            front.append(index)
            best = points[index][1]
    return front
