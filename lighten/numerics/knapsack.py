"""The choice of one option for every item, so that the sizes fit a budget and the sum of the costs is least.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11),
solved by dynamic programming over sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighten.errors import RequestError

MAX_UNITS = 2_000_000
"""Maximum number of columns of a table."""
MAX_TABLE = 200_000_000
"""Maximum number of bytes of a table."""


@dataclass(frozen=True)
class Option:
    """One way to store an item: its bytes, and its cost."""

    size: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """The chosen options."""

    indices: list[int]
    """Index of the chosen option of each item."""
    size: int
    """Bytes of all chosen options."""
    cost: float
    """Sum of the costs of the chosen options."""
    exact: bool
    """False if sizes were rounded up to keep the table small. Then a cheaper choice may exist."""


def choose(items: Sequence[Sequence[Option]], capacity: int, fixed: int = 0) -> Choice:
    """Returns the choice of least cost whose size is at most `capacity`.

    Args:
        items: the options of every item, at least one each.
        capacity: bytes.
        fixed: bytes that are spent in any case; they count against the capacity and towards the size.

    Raises:
        RequestError: even the smallest options do not fit; the message names the smallest possible size.
        ValueError: an item without options, or a cost that is not finite.
    """
    if any(not options or not all(math.isfinite(option.cost) for option in options) for options in items):
        raise ValueError("every item needs an option, and every cost must be finite")
    kept = [_undominated(options) for options in items]
    smallest = fixed + sum(options[rows[0]].size for options, rows in zip(items, kept, strict=True))
    if smallest > capacity:
        raise RequestError(
            f"a budget of {capacity:,} bytes is too small: the smallest size that can be reached is {smallest:,} bytes "
            f"({math.ceil(smallest / 1e4) / 100:,.2f} MB)"
        )
    extra = [
        [options[row].size - options[rows[0]].size for row in rows] for options, rows in zip(items, kept, strict=True)
    ]
    costs = [[options[row].cost for row in rows] for options, rows in zip(items, kept, strict=True)]
    room = capacity - smallest
    grain = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    most = max(1, min(MAX_UNITS, MAX_TABLE // max(len(items), 1)) - 1)
    coarse = 1
    if room >= sum(sizes[-1] for sizes in extra):
        picks = [len(sizes) - 1 for sizes in extra]
    else:
        coarse = max(1, -(-(room // grain) // most))
        unit = grain * coarse
        picks = _solve([[-(-size // unit) for size in sizes] for sizes in extra], costs, room // unit)
    indices = [rows[pick] for rows, pick in zip(kept, picks, strict=True)]
    taken = [options[index] for options, index in zip(items, indices, strict=True)]
    size, cost = fixed + sum(option.size for option in taken), math.fsum(option.cost for option in taken)
    return Choice(indices, size, cost, exact=coarse == 1)


def _undominated(options: Sequence[Option]) -> list[int]:
    """Returns the options that no other option beats in both size and cost, by rising size."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].size, options[index].cost)):
        if not kept or options[index].cost < options[kept[-1]].cost:
            kept.append(index)
    return kept


def _solve(sizes: list[list[int]], costs: list[list[float]], room: int) -> list[int]:
    """Returns the option for every item. Sizes are small whole numbers, and each item has an option of size 0."""
    import numpy as np

    longest = max((len(options) for options in sizes), default=1)
    best: np.ndarray[Any, np.dtype[np.float64]] = np.zeros(room + 1)  # of the items so far, in at most so many units
    back = np.zeros((len(sizes), room + 1), dtype=np.min_scalar_type(longest - 1))
    for row, options in enumerate(sizes):
        new = best + costs[row][0]
        for pick, size in enumerate(options[1:], 1):
            if size > room:
                break
            trial = best[: room + 1 - size] + costs[row][pick]
            better = trial < new[size:]
            new[size:][better] = trial[better]
            back[row, size:][better] = pick
        best = new
    picks: list[int] = []
    for row in range(len(sizes) - 1, -1, -1):
        picks.append(int(back[row, room]))
        room -= sizes[row][picks[-1]]
    return picks[::-1]
