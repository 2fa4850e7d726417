"""GPTQ: integer codes column by column, every error made good by the columns still to come (see `columns.py`)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from lighten.compress.quantize import formats
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.grid import Quantized, Symmetry, dequantize, quantize, rtn, search
from lighten.compress.quantize.linears import Linears
from lighten.compress.quantize.methods.gptq import Gptq
from lighten.compress.quantize.refine import refined
from lighten.numerics.columns import Columns, falling


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: Symmetry,
    desc_act: bool | Literal["static"],
    damp_percent: float,
    kind: torch.dtype = torch.float16,
    gone: torch.Tensor | None = None,
) -> Quantized:
    """Quantizes a weight matrix against the Gram matrix of its inputs.

    Args:
        weight: `[out, in]`, any float type.
        gram: `[in, in]`, float32: XᵀX. Inputs that are always zero get weight zero.
        bits: width of a code.
        group_size: inputs that share a scale, or −1 for all of them.
        sym: symmetric grid.
        desc_act: round the inputs in order of falling diag(H). Groups follow that order, or are "static": of
            neighbours, with scales that are searched before any column is rounded.
        damp_percent: share of mean diag(H) added to diag(H).
        kind: type that the scales are stored in.
        gone: `[out, in]`, which weights are pruned: they stay zero, and later columns make up for that too.

    Raises:
        ArithmeticError: the Gram could not be factorised.
    """
    width = weight.shape[1]
    group_size = width if group_size == -1 else group_size  # otherwise a divisor of the columns' BLOCK
    columns = Columns.of(weight, gram, damp_percent, gone, falling if desc_act else None)
    w, stays = columns.w, columns.stays  # [in, out]: a column of the paper is a row here
    # An error e in column j costs e² / U[j,j]². The search weighs columns by the square of 1 / U[j,j]², which spares
    # those that no later column can make good; docs/how-it-works.md has the powers that were tried.
    importance = columns.factor.diagonal().pow(-4)

    codes = torch.empty_like(w, dtype=torch.uint8)
    groups = width // group_size
    scales = torch.empty(groups, w.shape[1], device=w.device)
    zeros = torch.empty_like(scales)
    scale = zero = scales[0]
    placed: list[int] = []
    """The group of every row, if groups do not follow the order of the rows."""
    if columns.order is not None and desc_act == "static":
        of_row = columns.order // group_size
        placed = of_row.tolist()
        for number in range(groups):
            rows = (of_row == number).nonzero()[:, 0]
            scales[number], zeros[number] = search(columns.shown(rows), bits, sym, importance[rows], kind)

    def rounded(j: int) -> torch.Tensor:
        nonlocal scale, zero
        if placed:
            scale, zero = scales[placed[j]], zeros[placed[j]]
        elif j % group_size == 0:
            group = slice(j, j + group_size)
            scale, zero = search(columns.shown(group), bits, sym, importance[group], kind)
            scales[j // group_size], zeros[j // group_size] = scale, zero
        q = quantize(w[j], scale, zero, bits)
        if stays is not None:
            q = torch.where(stays[j], q, zero)
        codes[j] = q.to(torch.uint8)
        return dequantize(q, scale, zero)

    columns.round(rounded)
    g_idx = torch.arange(width, device=w.device) // group_size
    if columns.order is not None:
        back = torch.argsort(columns.order)
        codes = codes[back]
        g_idx = g_idx if placed else g_idx[back]
    return Quantized(codes, scales, zeros.int(), g_idx, columns.damping)


def codes(step: Gptq, linears: Linears) -> list[Stored]:
    """Quantizes linears against the Gram of their inputs; to nearest if that cannot be factorised."""
    weight, scale_type = linears.target, linears.scale_type
    try:
        found = gptq(
            weight,
            linears.gram,
            bits=linears.bits,
            group_size=step.group_size,
            sym=step.symmetry,
            desc_act=step.order,
            damp_percent=step.damp_percent,
            kind=scale_type,
            gone=linears.pruned(),
        )
    except ArithmeticError as error:
        found = rtn(weight, linears.bits, step.group_size, step.symmetry, scale_type)
        linears.note_fallback(error)
    else:
        if step.refine:
            found = refined(
                weight,
                linears.gram,
                found,
                bits=linears.bits,
                rounds=step.refine,
                kind=scale_type,
                gone=linears.pruned(),
            )
        linears.note_damping(step.damp_percent, found.damping)
    return linears.store(found, partial(formats.coded, step.format, linears.bits, step.sym, scale_type))
