"""The integer grid: scales, zero points, codes. Shared by every quantizer.

Weights are `[in, out]` here, the transpose of a linear's, so that a group of inputs is a block of whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

GroupSize = int | Literal["tensor"]
"""Inputs that share a scale; −1 for all of them, "tensor" for one scale of the whole matrix."""
Symmetry = bool | Literal["positive"]
"""Whether the zero point of a grid is in its middle; "positive" if it is, and no scale is below zero."""

SHRINKS = tuple(1.02 - 0.08 * step for step in range(8))
"""Fractions of the full range that the scale search tries first."""
NEAR = (-0.04, -0.02, 0.02, 0.04)
"""Fractions that the search then adds to the best of them."""

SIGNED_BELOW = 8
"""Bits below which the scale of a symmetric grid may be negative."""
SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16."""


@dataclass
class Quantized:
    """Codes of a weight matrix and what they stand for."""

    codes: torch.Tensor
    """`[in, out]`, 0 … 2^bits − 1, uint8."""
    scales: torch.Tensor
    """`[groups, out]`, float32, exactly representable in the type they are stored in."""
    zeros: torch.Tensor
    """`[groups, out]`, int32."""
    g_idx: torch.Tensor
    """`[in]`, the group of every input."""
    damping: float = 0.0
    """Share of the mean of diag(H) that was added to it."""

    def weight(self) -> torch.Tensor:
        """Returns the dequantized weight, `[out, in]`."""
        return ((self.codes.int() - self.zeros[self.g_idx]).float() * self.scales[self.g_idx]).t()

    def outputs(self, start: int, stop: int) -> Quantized:
        """Returns some of the outputs: one linear of those that were quantized together."""
        part = slice(start, stop)
        return Quantized(self.codes[:, part], self.scales[:, part], self.zeros[:, part], self.g_idx, self.damping)


def quantize(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the nearest codes, 0 … 2^bits − 1, as floats; the arguments broadcast."""
    return (w / scale + zero).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Returns the weights that codes stand for."""
    return (codes - zero) * scale


def rounding(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns what rounding adds to weights of groups `[…, group, out]`; scale and zero point are `[…, out]`."""
    steps, middle = scale.unsqueeze(-2), zero.unsqueeze(-2)
    moved = (w / steps).add_(middle).round_().clamp_(0, 2**bits - 1)
    return moved.sub_(middle).mul_(steps).sub_(w)


def full_range(
    w: torch.Tensor, bits: int, sym: Symmetry, kind: torch.dtype = torch.float16, shrink: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point of groups `[…, group, out]` such that the largest weight is on the grid.

    A symmetric grid has its zero point in the middle, 2^(bits−1), so that it reaches one step further down than up.
    With few bits that step matters: the scale is negative where the largest weight is positive, unless `sym` is
    "positive". Zero points are at least 1: the `gptq` format stores them less one. `kind` is the type that the scales
    are stored in, `shrink` the fraction of the range to cover.
    """
    top = 2**bits - 1
    if sym:
        middle, low, high = 2 ** (bits - 1), w.amin(-2), w.amax(-2)
        if bits < SIGNED_BELOW and sym != "positive":
            scale = torch.where(high > -low, -high, -low) * shrink / middle
        else:
            scale = torch.maximum(high, -low) * shrink / (top / 2)
        zero = torch.full_like(scale, middle)
    else:
        low, high = w.amin(-2).clamp(max=0) * shrink, w.amax(-2).clamp(min=0) * shrink
        scale = (high - low) / top
        zero = (-low / scale.clamp(min=SMALLEST_SCALE)).round_().clamp_(1, top)
    return storable(scale, kind), zero


def storable(scale: torch.Tensor, kind: torch.dtype = torch.float16) -> torch.Tensor:
    """Returns scales rounded to the type they are stored in, and not zero."""
    size = scale.abs().clamp(SMALLEST_SCALE, 65504.0).to(kind).float()
    return torch.where(scale < 0, -size, size)


def rtn(
    weight: torch.Tensor, bits: int, group_size: GroupSize, sym: Symmetry, kind: torch.dtype = torch.float16
) -> Quantized:
    """Rounds a weight matrix `[out, in]` to the nearest codes of the full range of each group."""
    w = weight.t().float()
    width, outputs = w.shape
    group = width if group_size in (-1, "tensor") else int(group_size)
    blocks = w.reshape(-1, group, outputs)
    if group_size == "tensor":
        scale, zero = full_range(w.reshape(-1, 1), bits, sym, kind)
        scale, zero = scale.expand(1, outputs), zero.expand(1, outputs)
    else:
        scale, zero = full_range(blocks, bits, sym, kind)
    codes = quantize(blocks, scale[:, None], zero[:, None], bits).to(torch.uint8).reshape(width, outputs)
    return Quantized(codes, scale, zero.int(), torch.arange(width, device=w.device) // group)


def nearest(
    weight: torch.Tensor, bits: int, group_size: int, sym: Symmetry, kind: torch.dtype = torch.float16
) -> torch.Tensor:
    """Returns the weights `[out, in]` that `rtn` would leave, float32: what training through a grid multiplies by."""
    w = weight.float()
    group = w.shape[1] if group_size == -1 else group_size
    blocks = w.view(len(w), -1, group).transpose(1, 2)  # [out, group, groups], in the order of the memory
    scale, zero = full_range(blocks, bits, sym, kind)
    steps, middle = scale[:, None], zero[:, None]
    return dequantize(quantize(blocks, steps, middle, bits), steps, middle).transpose(1, 2).flatten(1)


def search(
    w: torch.Tensor,
    bits: int,
    sym: Symmetry,
    weight: torch.Tensor | None = None,
    kind: torch.dtype = torch.float16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scale and zero point, each `[…, out]`, with the least (weighted) squared rounding error.

    Args:
        w: `[…, group, out]`, float32: one group or several.
        bits: width of the codes.
        sym: whether the zero point stays in the middle.
        weight: `[…, group]` importance of every input, or None for equal ones.
        kind: type that the scales are stored in.
    """
    widest, zero = full_range(w, bits, sym, kind)
    best_scale, best_zero, best = widest, zero, torch.ones_like(widest)
    least = torch.full_like(widest, torch.inf)
    error = torch.empty_like(w)
    low, high = (0, 2**bits - 1) if not sym else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for attempt in (*SHRINKS, *NEAR):
        if attempt == NEAR[0]:
            coarse = best
        shrink = torch.full_like(widest, attempt) if attempt in SHRINKS else coarse + attempt
        scale = storable(widest * shrink, kind)
        steps = scale.unsqueeze(-2)
        torch.div(w, steps, out=error)
        if sym:  # the zero point is whole: it can be left out of the rounding
            error.round_().clamp_(low, high)
        else:
            zero = full_range(w, bits, sym, kind, shrink)[1]
            middle = zero.unsqueeze(-2)
            error.add_(middle).round_().clamp_(low, high).sub_(middle)
        error.mul_(steps).sub_(w).square_()
        total = error.sum(-2) if weight is None else (weight.unsqueeze(-2) @ error).squeeze(-2)
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better, shrink, best)
        best_scale = torch.where(better, scale, best_scale)
        if not sym:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
