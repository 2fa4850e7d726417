"""`mxfp4` and `nvfp4`: 4-bit floats in blocks, with searched scales and error feedback."""

from __future__ import annotations

from functools import partial

import torch

from lighten.compress.quantize import float_grid, formats
from lighten.compress.quantize.float_grid import Blocked, Mxfp4Scales, Nvfp4Scales, Scales
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.linears import Linears
from lighten.compress.quantize.methods.blocks import Blocks
from lighten.model import e2m1
from lighten.numerics.columns import Columns, falling

TRIED = 2**13
"""Maximum number of outputs times scales that are tried at once: their block of columns stays in the cache."""


def settle(w: torch.Tensor, factor: torch.Tensor, scales: Scales, stays: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the numbers of the scales, `[out]`, with which a block loses least by error feedback.

    Every scale near the usual one is tried with the feedback inside the block. The sum of (e / U[j,j])² over its
    columns is then what the block costs after all later columns have made good what they can.

    Args:
        w: `[size, out]`, the columns of the block as they are by now.
        factor: `[size, size]`, their part of U.
        scales: those that can be stored.
        stays: `[size, out]`, which weights are not pruned.
    """
    first = scales.usual(w.abs().amax(0))
    numbers = torch.stack([scales.moved(first, step) for step in scales.steps])  # [tried, out]
    value = scales.value(numbers)
    size, (tried, outputs) = len(w), numbers.shape
    found = torch.empty_like(first)
    for part in range(0, outputs, width := max(1, TRIED // tried)):
        at = slice(part, part + width)
        steps = value[:, at]
        left = w[:, None, at].expand(size, *steps.shape).contiguous()
        flat, lost = left.flatten(1), torch.zeros_like(steps)
        for j in range(size):
            to = e2m1.nearest(left[j] / steps).mul_(steps)
            if stays is not None:
                to.mul_(stays[j, at])
            error = (left[j] - to).div_(factor[j, j])
            lost.addcmul_(error, error)
            flat[j + 1 :].addr_(factor[j, j + 1 :], error.flatten(), alpha=-1)
        found[at] = numbers[:, at].gather(0, lost.argmin(0, keepdim=True))[0]
    return found


def compensated(
    weight: torch.Tensor, gram: torch.Tensor, scales: Scales, damp_percent: float, gone: torch.Tensor | None = None
) -> Blocked:
    """Rounds a weight matrix `[out, in]` with error feedback; arguments as for `Columns.of`.

    Columns are rounded in order of falling diag(H). Blocks are of neighbours all the same, so all scales are found
    before any column is rounded.

    Raises:
        ArithmeticError: the Gram could not be factorised.
    """
    columns = Columns.of(weight, gram, damp_percent, gone, falling)
    assert columns.order is not None
    w, stays, size = columns.w, columns.stays, scales.size
    block_of = columns.order // size
    numbers = torch.empty(len(w) // size, w.shape[1], dtype=torch.int32, device=w.device)
    for block in range(len(numbers)):
        rows = (block_of == block).nonzero()[:, 0]
        stay = None if stays is None else stays[rows]
        numbers[block] = settle(columns.shown(rows), columns.factor[rows][:, rows], scales, stay)
    value = scales.value(numbers)
    values = torch.empty_like(w)

    def rounded(j: int) -> torch.Tensor:
        by_block = value[blocks_in_order[j]]
        values[j] = e2m1.nearest(w[j] / by_block)
        if stays is not None:
            values[j] *= stays[j]
        return values[j] * by_block

    blocks_in_order = block_of.tolist()
    columns.round(rounded)
    return Blocked(values[torch.argsort(columns.order)], numbers, scales, columns.damping)


def blocks(step: Blocks, linears: Linears) -> list[Stored]:
    """Rounds linears that read the same input. They share what the scales of NVFP4 are divided by, as kernels ask."""
    target = linears.target.float()
    scales = Nvfp4Scales.of(target) if step.block == Nvfp4Scales.size else Mxfp4Scales()
    found: Blocked | None = None
    if step.rounding == "gptq":
        try:
            found = compensated(target, linears.gram, scales, step.damp_percent, linears.pruned())
            linears.note_damping(step.damp_percent, found.damping)
        except ArithmeticError as error:
            linears.note_fallback(error)
    if found is None:
        w = target.t().contiguous()
        by_moments = step.rounding == "scales"
        numbers = float_grid.searched(w, scales, linears.gram) if by_moments else float_grid.usual(w, scales)
        found = float_grid.rounded(w, scales, numbers)
    return linears.store(found, partial(formats.float_blocks, largest_input=linears.largest))
