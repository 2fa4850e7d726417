"""Statistics of rows of logits, in numpy and in blocks that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.evaluate import machine

BLOCK = 8


def token_logprobs(
    logits: NDArray[np.float32], targets: NDArray[np.int64], at: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the log-probability (nats) `[m]` of tokens, and whether each was the most likely one.

    Args:
        logits: `[n, vocab]`.
        targets: token ids `[m]`.
        at: row of each target `[m]`; in order if left out.
    """
    normalizer = np.empty(len(logits))
    top = np.empty(len(logits), dtype=np.int64)

    def work(block: slice) -> None:
        normalizer[block], top[block], _ = _normalize(logits[block])

    _in_blocks(len(logits), work)
    at = np.arange(len(targets)) if at is None else at
    return logits[at, targets] - normalizer[at], top[at] == targets


def divergence(
    reference: NDArray[np.float32], variant: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns KL(reference || variant) in nats `[n]`, and whether both have the same most likely token.

    The sum runs over the whole vocabulary; if one has more columns (padding), over those both have.
    """
    vocab = min(reference.shape[1], variant.shape[1])
    kl = np.empty(len(reference))
    same = np.empty(len(reference), dtype=np.bool_)

    def work(block: slice) -> None:
        ours, theirs = reference[block, :vocab], variant[block, :vocab]
        our_normalizer, our_top, weights = _normalize(ours)
        their_normalizer, their_top, gap = _normalize(theirs)
        np.subtract(ours, theirs, out=gap)
        gap -= (our_normalizer - their_normalizer).astype(np.float32)[:, None]
        mean = np.einsum("ij,ij->i", weights, gap, dtype=np.float32) / weights.sum(-1)
        kl[block] = np.maximum(mean, 0)
        same[block] = our_top == their_top

    _in_blocks(len(reference), work)
    return kl, same


def _normalize(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float32]]:
    """Returns log Σ exp of each row, the column of its maximum, and exp(row - maximum)."""
    top = rows.argmax(-1)
    peak = rows[np.arange(len(rows)), top]
    weights = rows - peak[:, None]
    np.exp(weights, out=weights)
    return peak + np.log(weights.sum(-1).astype(np.float64)), top, weights


def _in_blocks(count: int, work: Callable[[slice], Any]) -> None:
    blocks = [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]
    with ThreadPoolExecutor(machine.cores()) as pool:  # numpy lets go of the interpreter lock
        list(pool.map(work, blocks))
