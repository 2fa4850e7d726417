"""Unstructured and N:M pruning: which weights of a matrix become zero, and what SparseGPT makes good for them.

Magnitude; Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024): |W| times the
norm of the input; SparseGPT (Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", 2023): algorithm 1, with H⁻¹ = UᵀU as in `gptq`.
"""

from __future__ import annotations

import torch

from lighten.compress.prune.amounts import parse_pattern
from lighten.numerics.columns import BLOCK
from lighten.numerics.damping import inverse_factor


def keep_largest(scores: torch.Tensor, sparsity: float, pattern: str | None = None) -> torch.Tensor:
    """Returns which of each row of `scores` `[rows, in]` to keep: without the smallest `sparsity`, or N of every M."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if pattern:
        count, of = parse_pattern(pattern)
        kept.view(len(scores), -1, of).scatter_(-1, scores.reshape(len(scores), -1, of).topk(count).indices, True)
        return kept
    count = scores.shape[-1] - int(sparsity * scores.shape[-1])
    return kept.scatter_(-1, scores.topk(count, sorted=False).indices, True)


def magnitude(weight: torch.Tensor, sparsity: float, pattern: str | None = None) -> torch.Tensor:
    """Returns a matrix `[out, in]` without its smallest weights, of the whole matrix or of every M."""
    scores = weight.float().abs()
    flat = scores if pattern else scores.reshape(1, -1)
    return weight * keep_largest(flat, sparsity, pattern).view_as(weight)


def above(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns a matrix without the weights whose size is below a threshold."""
    return weight * (weight.float().abs() >= threshold)


def wanda(weight: torch.Tensor, diagonal: torch.Tensor, sparsity: float, pattern: str | None = None) -> torch.Tensor:
    """Returns a matrix `[out, in]` without the weights of each output that are least in |W| · ‖input‖.

    `diagonal` is diag(H), the sum of squares of every input.
    """
    return weight * keep_largest(weight.float().abs() * diagonal.sqrt(), sparsity, pattern)


def prepare(gram: torch.Tensor, damp_percent: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factor of H⁻¹ that `sparsegpt` needs, and which inputs are always zero.

    Raises:
        ArithmeticError: the Gram could not be factorised.
    """
    dead = gram.diagonal() == 0
    if dead.any():
        gram = gram.clone()
        gram.diagonal()[dead] = 1.0
    return inverse_factor(gram, damp_percent)[0], dead


def sparsegpt(
    weight: torch.Tensor,
    prepared: tuple[torch.Tensor, torch.Tensor],
    sparsity: float,
    pattern: str | None = None,
) -> torch.Tensor:
    """Removes weights column by column; later columns make good for every error.

    Args:
        weight: `[out, in]`.
        prepared: the result of `prepare` for the Gram of the inputs.
        sparsity: share of the weights of every block of columns that become zero, if there is no pattern.
        pattern: N:M, chosen when the first of the M columns is reached.

    Returns:
        The new weights, float32 `[out, in]`. Inputs that are always zero get weight zero.
    """
    factor, dead = prepared
    width = weight.shape[1]
    w = weight.t().to(torch.float32, copy=True).contiguous()  # [in, out]: a column of the paper is a row here
    w[dead] = 0.0
    pivots = factor.diagonal()
    of = parse_pattern(pattern)[1] if pattern else 0
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = torch.empty(stop - start, w.shape[1], device=w.device)
        if not pattern:
            scores = (w[start:stop] / pivots[start:stop, None]).square()
            kept = keep_largest(scores.reshape(1, -1), sparsity).view_as(scores)
        for j in range(start, stop):
            if pattern and (j - start) % of == 0:
                scores = (w[j : j + of] / pivots[j : j + of, None]).square()
                kept = keep_largest(scores.t(), sparsity, pattern).t()
            mask = kept[(j - start) % of if pattern else j - start]
            error = torch.where(mask, 0.0, w[j]).div_(pivots[j])
            w[j] *= mask
            errors[j - start] = error
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return w.t().contiguous()


class Magnitudes:
    """Counts weights by their size in bfloat16: 32,768 sizes, so the order is exact and takes little memory."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2**15, dtype=torch.int64)

    def add(self, weight: torch.Tensor) -> None:
        """Counts the weights of a matrix."""
        sizes = weight.bfloat16().abs().flatten().view(torch.int16)
        self.counts += torch.bincount(sizes.int(), minlength=2**15)

    def threshold(self, sparsity: float) -> float:
        """Returns the size below which the given share of the counted weights lies, to the next bfloat16 size."""
        below = self.counts.cumsum(0)
        wanted = int(sparsity * int(below[-1]))
        place = int(torch.searchsorted(below, wanted, right=True))
        return float(torch.tensor(place, dtype=torch.int16).view(torch.bfloat16))
