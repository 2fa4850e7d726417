"""Quantized weights in the form that OpenVINO's plugins unpack while they multiply.

A weight `[out, in]` is a constant of codes `[out, groups, size]`, less its zero points, times its scales. Plugins keep
the codes packed if the graph spells it in this order. What a GPTQ or AWQ checkpoint stores fits without a change of
value. Codes of 2 and 3 bits take the place of 4-bit codes. Inputs whose groups are not runs of neighbours are put in
order first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lighten.errors import Failure
from lighten.model.quantized.packed import Codes

SMALLEST_GROUP = 4
"""Minimum number of inputs of a group: plugins unpack smaller ones before they multiply."""
WIDTHS = (4, 8)
"""Bits of a code of a graph."""
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Stored:
    """A weight as a graph holds it."""

    codes: torch.Tensor
    """`[out, groups, size]`: uint8, or int8 if there are no zero points."""
    scales: torch.Tensor
    """`[out, groups, 1]`, float16 or float32."""
    zeros: torch.Tensor | None
    """Zero points `[out, groups, 1]`, uint8; None if codes are signed."""
    order: torch.Tensor | None
    """Input for each place, `[in]`; None if they stay."""
    bits: int

    def weight(self) -> torch.Tensor:
        """Returns the weight, `[out, in]` in float32, its inputs in their first order."""
        codes = self.codes.float() if self.zeros is None else self.codes.float() - self.zeros.float()
        placed = (codes * self.scales.float()).flatten(1)
        if self.order is None:
            return placed
        found = torch.empty_like(placed)
        found[:, self.order] = placed
        return found


def keep(found: Codes, where: str) -> Stored:
    """Returns a linear of a checkpoint, every weight unchanged.

    Raises:
        Failure: codes are wider than 8 bits, or groups are too small.
    """
    bits = next((width for width in WIDTHS if found.bits <= width), None)
    if bits is None:
        raise Failure(f"{where} has codes of {found.bits} bits: OpenVINO has room for {WIDTHS[-1]}")
    order, g_idx = None, found.g_idx
    if (g_idx.diff() < 0).any():
        order = torch.argsort(g_idx, stable=True)
        g_idx = g_idx[order]
    size = _shared_size(g_idx)
    if size < SMALLEST_GROUP:
        raise Failure(f"{where} has groups that only divide into runs of {size} inputs: OpenVINO cannot keep it packed")
    groups = g_idx[::size]
    codes = (found.codes if order is None else found.codes[order]).t().reshape(-1, len(groups), size)
    zeros = found.zeros[groups].t()[..., None]
    scales = _fitting(found.scales[groups].t()[..., None].contiguous())
    if (signed := _signed(codes, zeros, bits)) is not None:
        return Stored(signed, scales, None, order, bits)
    return Stored(codes.to(torch.uint8).contiguous(), scales, zeros.to(torch.uint8).contiguous(), order, bits)


def _shared_size(g_idx: torch.Tensor) -> int:
    """Returns the largest size of runs, all alike, of which none crosses the border of two groups."""
    borders = torch.nonzero(g_idx.diff()).flatten() + 1
    return math.gcd(len(g_idx), *borders.tolist())


def _signed(codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Returns the codes less their zero point, if all have the same one and signed codes hold what is left."""
    zero, half = int(zeros.flatten()[0]), 1 << (bits - 1)
    if not bool((zeros == zero).all()):
        return None
    moved = codes - zero
    if int(moved.min()) < -half or int(moved.max()) >= half:
        return None
    return moved.to(torch.int8).contiguous()


def _fitting(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales in float16 if it holds each of them, else in float32."""
    half = scales.to(torch.float16)
    return half if bool((half.float() == scales.float()).all()) else scales.float()


def rounded(weight: torch.Tensor, bits: int, size: int | None, *, zero_point: bool) -> Stored:
    """Returns a weight `[out, in]` rounded to the nearest codes, with a scale for every group.

    Args:
        weight: any floats.
        bits: 4 or 8.
        size: inputs of a group; the largest power of two below it that divides them. None for a scale for each row.
        zero_point: with zero points. Without them, the weight that is farthest from zero has the code that is farthest
            from zero, and only weights as far on the other side are clipped.
    """
    inputs = weight.shape[1]
    size = inputs if size is None else fitting_size(inputs, size)
    grouped = weight.float().reshape(len(weight), -1, size)
    half, most = 1 << (bits - 1), (1 << bits) - 1
    if not zero_point:
        farthest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        scales = _stored_scales(farthest / -half)
        codes = (grouped / _divisors(scales)).round().clamp(-half, half - 1)
        return Stored(codes.to(torch.int8), scales, None, None, bits)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scales = _stored_scales((high - low) / most)
    zeros = (-low / _divisors(scales)).round().clamp(0, most)
    codes = ((grouped / _divisors(scales)).round() + zeros).clamp(0, most)
    return Stored(codes.to(torch.uint8), scales, zeros.to(torch.uint8), None, bits)


def fitting_size(inputs: int, size: int) -> int:
    """Returns the largest size that divides the inputs and the wanted size: that one, its half, …; all if none does."""
    while size >= SMALLEST_GROUP:
        if inputs % size == 0:
            return size
        size //= 2
    return inputs


def _stored_scales(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales as they are stored: in float16, unless it would lose digits of some of them."""
    sizes = scales.abs()
    normal = bool(((sizes == 0) | ((sizes >= _HALF.tiny) & (sizes <= _HALF.max))).all())
    return scales.to(torch.float16) if normal else scales


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1, scales.float())
