"""Whether repeated speeds are reliable: the error of their median, and a drift of the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

CONFIDENCE = 0.95
UNSTEADY = 0.10
"""Spread of repeats above which a speed is marked wherever it is shown."""
DRIFTED = 0.05
"""Change between the first and the last third of the repeats that counts as a drift, unless it is scatter."""
REPEATED = 0.05
"""Difference between two measurements of one speed on a quiet machine above which it is reported."""
ORDERED = 0.6
"""Kendall's tau with time above which a change is not scatter."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns an interval of the median from order statistics, with no assumed distribution.

    With six values or more it holds the median with at least 95 %. With fewer values it is their whole range.
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
    """Returns half the width of the median's interval, relative to the median."""
    low, high = interval(values)
    return (high - low) / 2 / median(values)


def spread(values: Sequence[float]) -> float:
    """Returns (max − min) / median."""
    return (max(values) - min(values)) / median(values)


def apart(first: float, second: float) -> float:
    """Returns how far the larger of two speeds is above the smaller, relative to the smaller."""
    return max(first, second) / min(first, second) - 1


def drift(values: Sequence[float]) -> float:
    """Returns the relative change from the first to the last third; 0 if it may be scatter."""
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
