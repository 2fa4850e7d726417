"""The uncertainty of a difference: the paired bootstrap of a perplexity ratio, McNemar's test of two accuracies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from lighten.evaluate.paired import Z95, student95

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEED = 0
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; no interval if there are too few values."""

    value: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Paired:
    """The same tasks answered by two models: how many only the second answers rightly, and how many only the first.

    `p` is McNemar's: the probability of a split that is at least as uneven, if both were equally good.
    """

    gained: int
    lost: int
    difference: Interval
    p: float


def bootstrap_ratio(
    nll: NDArray[np.floating[Any]], base: NDArray[np.floating[Any]], *, seed: int = SEED, resamples: int = RESAMPLES
) -> Interval:
    """Returns perplexity / base perplexity with its 95 % interval, by a paired bootstrap over chunks.

    Chunks are drawn with replacement, each with both its values, so that what a chunk does to both cancels out. The
    percentiles are widened for few chunks, as a normal quantile is to Student's (the expanded percentile interval of
    Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). Fewer than three chunks have no interval.

    Args:
        nll: negative log-likelihoods `[chunks, positions]`.
        base: negative log-likelihoods of the other model at the same positions.
        seed: seed of the draws; the same seed gives the same interval.
        resamples: number of draws.
    """
    import numpy as np

    change = nll.astype("float64").mean(axis=1) - base.astype("float64").mean(axis=1)
    count = len(change)
    value = math.exp(change.mean())
    if count < 3:
        return Interval(value, None)
    tail = NormalDist().cdf(-student95(count - 1) * math.sqrt(count / (count - 1)))
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.exp(np.quantile(change[drawn].mean(axis=1), [tail, 1 - tail]))
    return Interval(value, (float(low), float(high)))


def mcnemar(gained: int, lost: int, tasks: int) -> Paired:
    """Returns the difference of two accuracies on the same tasks: exact two-sided p, and a 95 % interval.

    The p-value is binomial (McNemar 1947, exact form): of the tasks that flipped, half should have gone either way.
    The interval is Bonett and Price's (2012): Wald's with one task added to each kind of flip, which stays sensible
    where few or none flipped.

    Args:
        gained: tasks that only the second answers rightly.
        lost: tasks that only the first does.
        tasks: all of them.
    """
    flipped = gained + lost
    below = sum(math.comb(flipped, k) for k in range(min(gained, lost) + 1))
    p = min(1.0, 2 * below / 2**flipped)
    up, down = (gained + 1) / (tasks + 2), (lost + 1) / (tasks + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (tasks + 2))
    interval = max(-1.0, up - down - half), min(1.0, up - down + half)
    return Paired(gained, lost, Interval((gained - lost) / tasks, interval), p)
