"""The learning rate over the steps of a training."""

from __future__ import annotations

import math


def share_of_rate(done: int, steps: int, warmup: float, least: float) -> float:
    """Returns the share of the largest rate: it rises linearly, then falls in half a cosine.

    Args:
        done: number of steps that were made.
        steps: number of all of them.
        warmup: share of the steps in which it rises.
        least: share that it falls to.
    """
    warm = max(1, round(warmup * steps))
    if done < warm:
        return (done + 1) / warm
    over = (done - warm) / max(1, steps - warm)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * over))
