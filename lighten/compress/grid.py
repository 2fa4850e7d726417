"""The integer grid: scales, zero points, codes. Shared by every quantizer."""

from __future__ import annotations

import torch

SHRINKS = tuple(1.02 - 0.02 * step for step in range(30))
"""Fractions of the full range that the scale search tries."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16."""


def quantize(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the nearest codes, 0 … 2^bits − 1, as floats; the arguments broadcast."""
    return (w / scale + zero).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Returns the weights that codes stand for."""
    return (codes - zero) * scale


def full_range(w: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale and zero point of groups `[group, out]` such that every weight is within the grid.

    A symmetric grid has its zero point in the middle, 2^(bits−1). Zero points are at least 1: the `gptq` format
    stores them less one.
    """
    top = 2**bits - 1
    if sym:
        scale = w.abs().amax(0) / (top / 2)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale.clamp(min=SMALLEST_SCALE)).round_().clamp_(1, top)
    return storable(scale), zero


def storable(scale: torch.Tensor) -> torch.Tensor:
    """Returns scales rounded to float16, the type they are stored in, and above zero."""
    return scale.clamp(SMALLEST_SCALE, 65504.0).half().float()


def search(
    w: torch.Tensor, bits: int, sym: bool, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scale and zero point, each `[out]`, with the least (weighted) squared rounding error.

    Args:
        w: `[group, out]`, float32.
        bits: width of the codes.
        sym: whether the zero point stays in the middle.
        weight: `[group]` importance of every input, or None for equal ones.
    """
    widest, zero = full_range(w, bits, sym)
    best_scale, best_zero = widest, zero
    least = torch.full_like(widest, torch.inf)
    for shrink in SHRINKS:
        scale = storable(widest * shrink)
        if not sym:
            zero = full_range(w * shrink, bits, sym)[1]
        error = (dequantize(quantize(w, scale, zero, bits), scale, zero) - w).square_()
        total = error.sum(0) if weight is None else weight @ error
        better = total < least
        least = torch.where(better, total, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
