"""Error feedback: columns are rounded one after the other, every error made good by the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023),
algorithm 1: with H⁻¹ = UᵀU (U upper triangular), rounding column j by an error e changes every later column k by
−e · U[j,k] / U[j,j]. What a column is rounded to is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lighten.numerics.damping import inverse_factor

BLOCK = 128


@dataclass
class Columns:
    """The columns of a weight in the order in which they are rounded. They are rows here."""

    w: torch.Tensor
    """`[in, out]`, float32: what is left to be rounded of every column."""
    factor: torch.Tensor
    """U, `[in, in]`."""
    damping: float
    """Share of the mean of diag(H) that was added to it."""
    order: torch.Tensor | None
    """`[in]`, the input at each place; None for their own order."""
    stays: torch.Tensor | None
    """`[in, out]`, which weights are not pruned; None if all are not."""

    @staticmethod
    def of(
        weight: torch.Tensor,
        gram: torch.Tensor,
        damp_percent: float,
        gone: torch.Tensor | None = None,
        order: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Columns:
        """Prepares a weight matrix.

        Args:
            weight: `[out, in]`, any float type.
            gram: `[in, in]`, float32: XᵀX. Inputs that are always zero get weight zero.
            damp_percent: share of mean diag(H) added to diag(H).
            gone: `[out, in]`, which weights are pruned.
            order: returns the input at each place, from diag(H).

        Raises:
            ArithmeticError: the Gram could not be factorised.
        """
        w = weight.t().to(torch.float32, copy=True).contiguous()
        diagonal = gram.diagonal().clone()
        dead = diagonal == 0
        if dead.any():
            gram = gram.clone()
            gram.diagonal()[dead] = 1.0
            w[dead] = 0.0
        places = order(diagonal) if order else None
        stays = None if gone is None else ~gone.t()
        if places is not None:
            w, gram = w[places], gram[places][:, places]
            stays = None if stays is None else stays[places]
        factor, damping = inverse_factor(gram, damp_percent)
        return Columns(w, factor, damping, places, stays)

    def shown(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Returns what is left of some columns, pruned weights as zeros."""
        return self.w[rows] if self.stays is None else self.w[rows] * self.stays[rows]

    def round(self, rounded: Callable[[int], torch.Tensor]) -> None:
        """Goes through the columns. `rounded` returns what column j, as it is by then, is rounded to, `[out]`.

        It may look at columns up to the end of a block of 128.
        """
        w, factor = self.w, self.factor
        for start in range(0, len(w), BLOCK):
            stop = min(start + BLOCK, len(w))
            errors = torch.empty(stop - start, w.shape[1], device=w.device)
            for j in range(start, stop):
                error = (w[j] - rounded(j)).div_(factor[j, j])
                errors[j - start] = error
                w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


def falling(diagonal: torch.Tensor) -> torch.Tensor:
    """Returns the places of numbers in falling order."""
    return torch.argsort(diagonal, descending=True, stable=True)
