"""`mse`: each group takes the range whose rounding changes its weights least; what lies beyond is clipped.

Rounding to nearest makes the largest weight of a group representable. A shorter range has finer steps: most weights
come out closer, and the largest one further off. `mse` tries ranges and keeps, for each output of each group, the best.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lighten.compress.quantize.methods.rtn import Rtn
from lighten.compress.quantize.settings import GroupSize

if TYPE_CHECKING:  # settings are read by every command, so nothing heavy is imported before there is work
    import torch

    from lighten.compress.quantize.formats import Stored
    from lighten.compress.quantize.grid import Quantized
    from lighten.compress.quantize.linears import Linears


class Mse(Rtn):
    """Settings of `mse`: those of `rtn`, stored in the same formats, and one more."""

    rounds: ClassVar[str] = "lighten_mse:codes"

    method: Literal["mse"] = Field("mse", description="how to choose the codes")
    group_size: GroupSize = 128
    ranges: int = Field(16, ge=1, le=64, description="mse: ranges to try, from the whole one to half (default: 16)")


def codes(step: Mse, linears: Linears) -> list[Stored]:
    """Rounds linears that read the same input; the Gram of that input is not needed."""
    from lighten.compress.quantize import formats

    found = clipped(linears.together, linears.bits, step.group_size, step.sym, linears.scale_type, step.ranges)
    return linears.store(found, partial(formats.coded, step.format, linears.bits, step.sym, linears.scale_type))


def clipped(
    weight: torch.Tensor, bits: int, group_size: int, sym: bool, scale_type: torch.dtype, ranges: int
) -> Quantized:
    """Returns a weight `[out, in]` on the grid of each group's best range."""
    import torch

    from lighten.compress.quantize.grid import Quantized, full_range, quantize, rounding

    width = weight.shape[1]
    group = width if group_size == -1 else group_size
    blocks = weight.t().float().reshape(-1, group, len(weight))  # [groups, group, out]
    scale, zero = full_range(blocks, bits, sym, scale_type)
    least = rounding(blocks, scale, zero, bits).square().sum(1)
    for number in range(1, ranges):
        narrow, middle = full_range(blocks, bits, sym, scale_type, shrink=1 - 0.5 * number / ranges)
        error = rounding(blocks, narrow, middle, bits).square().sum(1)
        better = error < least
        scale, zero = torch.where(better, narrow, scale), torch.where(better, middle, zero)
        least = torch.where(better, error, least)
    found = quantize(blocks, scale[:, None], zero[:, None], bits).to(torch.uint8).reshape(width, len(weight))
    return Quantized(found, scale, zero.int(), torch.arange(width, device=weight.device) // group)
