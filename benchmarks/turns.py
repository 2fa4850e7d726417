"""Decodes with two models alternately, so that what else the machine does meanwhile meets both."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

TURNS = 11
"""Of each opening."""
OPENINGS = 2
"""The pages that a model gets in memory make it up to 5 % faster or slower until it is opened again."""
PROMPT, STEPS = 64, 64


def decode_in_turn(
    ours: Path, theirs: Path, turns: int = TURNS, openings: int = OPENINGS, steps: int = STEPS
) -> dict[str, Any]:
    """Returns tokens per second of each turn of either model, the medians, and the median of the turns' ratios.

    Args:
        ours: a model.
        theirs: the model that it is compared with.
        turns: number of turns of each opening, after one that warms up.
        openings: how often both are opened. The one and the other is opened first, by turns.
        steps: tokens of a turn.
    """
    import numpy as np

    from lighten.evaluate.runtimes.choose import open_runtime

    rates: list[list[float]] = [[], []]
    for places in [(0, 1), (1, 0)] * (openings // 2):
        opened = {place: open_runtime((ours, theirs)[place]) for place in places}
        prompt = np.random.default_rng(0).integers(0, opened[0].vocab, (1, PROMPT))
        for turn in range(turns + 1):
            for place in (0, 1) if turn % 2 else (1, 0):
                passed = opened[place].generate(prompt, steps).token_s
                if turn:  # the first warms up
                    rates[place].append(1 / statistics.median(passed))
        for runtime in opened.values():
            runtime.close()
    medians = [statistics.median(each) for each in rates]
    return {
        "ours_tok_s": medians[0],
        "theirs_tok_s": medians[1],
        "ratio": statistics.median(mine / other for mine, other in zip(*rates, strict=True)),
        "ours": rates[0],
        "theirs": rates[1],
    }
