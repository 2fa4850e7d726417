"""Whether repeated speeds can be relied on: how far their median may be off, and whether the machine drifted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

CONFIDENCE = 0.95
UNSTEADY = 0.10
"""Spread of repeats above which a speed is marked wherever it is shown."""
DRIFTED = 0.05
"""Change between the first and the last third of the repeats that is called a drift, if it is no scatter."""
REPEATED = 0.05
"""Difference between two measurements of the same on a quiet machine, above which it is told."""
ORDERED = 0.6
"""Kendall's tau with time above which a change is no scatter."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns an interval of the median from order statistics: no distribution is assumed.

    It holds the median with at least 95 % where there are six values or more; with fewer it is all of them.
    """
    ordered, count = sorted(values), len(values)
    outside, left_out = 0.0, 0
    for cut in range((count - 1) // 2):
        outside += 2 * math.comb(count, cut) / 2**count
        if 1 - outside < CONFIDENCE:
            break
        left_out = cut
    return ordered[left_out], ordered[-1 - left_out]


def relative_error(values: Sequence[float]) -> float:
    """Returns half the width of the median's interval, relative to it."""
    low, high = interval(values)
    return (high - low) / 2 / median(values)


def spread(values: Sequence[float]) -> float:
    """Returns (max − min) / median."""
    return (max(values) - min(values)) / median(values)


def apart(first: float, second: float) -> float:
    """Returns how far the larger of two speeds is above the smaller, relative to that."""
    return max(first, second) / min(first, second) - 1


def drift(values: Sequence[float]) -> float:
    """Returns the relative change from the first to the last third, 0 where it may be scatter."""
    count = len(values)
    if count < 6:
        return 0.0
    pairs = [(values[late] > values[early]) - (values[late] < values[early]) for early, late in _pairs(count)]
    tau = sum(pairs) / len(pairs)
    third = count // 3
    change = median(values[-third:]) / median(values[:third]) - 1
    return change if abs(tau) >= ORDERED and abs(change) > DRIFTED else 0.0


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(early, late) for late in range(count) for early in range(late)]
