"""Linears and embeddings as integer codes, spelled as XNNPACK's partitioner and ExecuTorch's kernels know them.

A weight `[out, in]` of 4 bits is codes from -8 to 7 with a scale above zero for every group of inputs, which XNNPACK
keeps in bfloat16. One of 8 bits has a scale for every output. There are no zero points. What a checkpoint has instead,
zero points or scales below zero, is a constant for every group: it is multiplied with the sum of the group's inputs, in
float32. Inputs are rounded to 8 bits, every token with a scale and a zero point of its own, while the
program runs. Before that they are levelled (see `loudness`): the loudest stay floats, with their columns of the weight
in float32, and what lies far out may be rounded apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from lighten.errors import Failure
from lighten.export.executorch.settings import SMALLEST_GROUP
from lighten.model.quantized.packed import Codes

_INPUT = -128, 127
"""Range of the codes of inputs."""
FAR = 4.0
"""Inputs of more than so many times the mean size of a token's inputs are rounded apart from the rest."""


@dataclass(frozen=True)
class Stored:
    """A weight as the program holds it."""

    codes: torch.Tensor
    """`[out, in]`, int8."""
    scales: torch.Tensor
    """`[out, groups]`, above zero: float32 that bfloat16 holds; any float32 with one group in 8 bits."""
    order: torch.Tensor | None
    """Input for each place, `[in]`; None if they stay."""
    bits: int
    offsets: torch.Tensor | None = None
    """What every weight of a group has beside its code times the scale, `[out, groups]`; None if all have nothing."""
    levels: torch.Tensor | None = None
    """What inputs are divided by before they are rounded, `[in]`, in the order of the codes; None for one."""
    aside: torch.Tensor | None = None
    """Places of inputs that are not rounded, `[k]`, in the order of the codes; None if all are."""
    columns: torch.Tensor | None = None
    """Weights of these inputs, `[out, k]`, in the place of what their codes give."""

    @property
    def size(self) -> int:
        """Inputs of a group."""
        return self.codes.shape[1] // self.scales.shape[1]

    def coded(self) -> torch.Tensor:
        """Returns the weight without its offsets, `[out, in]` in float32, in the order of the codes."""
        placed = self.codes.float() * self.scales.repeat_interleave(self.size, 1)
        if self.levels is not None:
            placed /= self.levels
        if self.aside is not None and self.columns is not None:
            placed[:, self.aside] = self.columns
        return placed

    def weight(self) -> torch.Tensor:
        """Returns the weight, `[out, in]` in float32, its inputs in their first order."""
        placed = self.coded()
        if self.offsets is not None:
            placed += self.offsets.repeat_interleave(self.size, 1)
        if self.order is None:
            return placed
        found = torch.empty_like(placed)
        found[:, self.order] = placed
        return found


def keep(found: Codes, where: str) -> Stored:
    """Returns a linear of a checkpoint: its codes unchanged or mirrored, its scales rounded to bfloat16.

    Raises:
        Failure: XNNPACK has no form for it: more than 4 bits, or groups whose size is no multiple of 32.
    """
    if found.bits > 4:
        raise Failure(
            f"{where} has codes of {found.bits} bits in groups: ExecuTorch has groups for 4 bits only. Set type: int8 "
            "or fp32, which unpack the weights"
        )
    order, g_idx = None, found.g_idx
    if bool((g_idx.diff() < 0).any()):
        order = torch.argsort(g_idx, stable=True)
        g_idx = g_idx[order]
    counts = torch.bincount(g_idx, minlength=len(found.scales))
    size = int(counts[0])
    if bool((counts != size).any()) or size % SMALLEST_GROUP:
        raise Failure(
            f"{where} has groups of {size} inputs, and ExecuTorch takes multiples of {SMALLEST_GROUP}: quantize with "
            f"group_size: {SMALLEST_GROUP}, or set type: int8 or fp32, which unpack the weights"
        )
    middle, most = 1 << (found.bits - 1), (1 << found.bits) - 1
    scales, zeros = _shortened(found.scales.t()), found.zeros.t()
    codes = (found.codes if order is None else found.codes[order]).t()
    below = scales < 0  # s (q - z) = -s ((most - q) - (most - z))
    zeros = torch.where(below, most - zeros, zeros)
    codes = torch.where(below.repeat_interleave(size, 1), most - codes, codes) - middle
    none = scales == 0
    codes = torch.where(none.repeat_interleave(size, 1), 0, codes)
    offsets = scales.abs() * (middle - zeros)
    return Stored(
        codes.to(torch.int8).contiguous(),
        torch.where(none, 1, scales.abs()),
        order,
        4,
        offsets.contiguous() if bool(offsets.any()) else None,
    )


def levelled(stored: Stored, steps: torch.Tensor, aside: torch.Tensor | None = None) -> Stored:
    """Returns the same weight for inputs that are divided by powers of two, `[groups]`. No code changes.

    Args:
        stored: the weight.
        steps: the powers.
        aside: places of inputs that are not rounded at all, `[k]`.
    """
    columns = None if aside is None else stored.coded()[:, aside]
    levels = steps.repeat_interleave(stored.size)
    return replace(stored, scales=stored.scales * steps, levels=levels, aside=aside, columns=columns)


def rounded(
    weight: torch.Tensor,
    bits: int,
    size: int | None,
    levels: torch.Tensor | None = None,
    aside: torch.Tensor | None = None,
) -> Stored:
    """Returns a weight `[out, in]` rounded to the nearest codes, by the smallest scales that clip nothing.

    Args:
        weight: any floats.
        bits: 4 or 8.
        size: inputs of a group, which divides them; None for one scale for each output.
        levels: what inputs will be divided by, `[in]`; None for one.
        aside: places of inputs that will not be rounded, `[k]`, whose weights stay floats.
    """
    columns = None if aside is None else weight[:, aside].float()
    weight = weight.float() if levels is None else weight.float() * levels
    weight = weight if aside is None else weight.index_fill(1, aside, 0)
    grouped = weight.reshape(len(weight), -1, size or weight.shape[1])
    most = 1 << (bits - 1)
    scales = torch.maximum(grouped.amax(-1) / (most - 1), grouped.amin(-1) / -most)
    scales = scales if size is None else _shortened(scales)
    scales = torch.where(scales == 0, 1, scales)  # XNNPACK refuses 0
    codes = (grouped / scales[..., None]).round().clamp(-most, most - 1)
    return Stored(codes.flatten(1).to(torch.int8), scales, None, bits, None, levels, aside, columns)


def _shortened(scales: torch.Tensor) -> torch.Tensor:
    return scales.to(torch.bfloat16).float().contiguous()


class CodedLinear(nn.Module):
    """A linear whose inputs are rounded as it is run."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None
    quieter: torch.Tensor | None

    def __init__(self, stored: Stored, bias: torch.Tensor | None, *, apart: bool = False) -> None:
        """Takes the weight, `[out]` or nothing to add, and whether inputs that lie far out are rounded apart."""
        super().__init__()
        self.out_features, self.in_features = stored.codes.shape
        self.bits, self.size = stored.bits, stored.size
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scales", stored.scales)
        self.register_buffer("zeros", torch.zeros_like(stored.scales, dtype=torch.int8))
        self.register_buffer("order", stored.order)
        quieter = None if stored.levels is None else 1 / stored.levels
        sums, columns = [], []
        if stored.aside is not None and stored.columns is not None:
            quieter = torch.ones(self.in_features) if quieter is None else quieter
            quieter[stored.aside] = 0
            sums.append(nn.functional.one_hot(stored.aside, self.in_features).float())
            columns.append(stored.columns)
        if stored.offsets is not None:
            sums.append(torch.eye(stored.offsets.shape[1]).repeat_interleave(stored.size, 1))
            columns.append(stored.offsets)
        # products with ones pick and add up inputs: XNNPACK has no operator for it, and another would cut the program
        self.sums = nn.Parameter(torch.cat(sums), requires_grad=False) if sums else None
        self.columns = nn.Parameter(torch.cat(columns, 1), requires_grad=False) if columns else None
        self.register_buffer("quieter", quieter)
        self.far = None
        if apart:
            self.far = nn.Parameter(torch.full((1, self.in_features), FAR / self.in_features), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the product `[…, out]` for inputs `[…, in]`."""
        if self.order is not None:
            inputs = inputs.index_select(-1, self.order)
        level = inputs if self.quieter is None else inputs * self.quieter
        if self.far is None:
            found = self._product(level, self.bias)
        else:
            edge = nn.functional.linear(level.abs(), self.far)
            near = torch.minimum(torch.maximum(level, -edge), edge)
            found = self._product(near, self.bias) + self._product(level - near, None)
        if self.sums is not None and self.columns is not None:
            found = found + nn.functional.linear(nn.functional.linear(inputs, self.sums), self.columns)
        return found

    def _product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        block = [1] * (inputs.dim() - 1) + [self.in_features]
        ops, (low, high) = torch.ops.torchao, _INPUT
        scale, zero = ops.choose_qparams_affine(
            inputs, "ASYMMETRIC", block, torch.int8, low, high, None, torch.float32, torch.int8
        )
        codes = ops.quantize_affine(inputs, block, scale, zero, torch.int8, low, high)
        seen = ops.dequantize_affine(codes, block, scale, zero, torch.int8, low, high, torch.float32)
        half = 1 << (self.bits - 1)
        weight = ops.dequantize_affine(
            self.codes, [1, self.size], self.scales, self.zeros, torch.int8, -half, half - 1, torch.float32
        )
        return nn.functional.linear(seen, weight, bias)


class CodedEmbedding(nn.Module):
    """A table of 8-bit codes with a scale for every row."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scales", stored.scales[:, 0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows `[…, width]` of ids."""
        found: torch.Tensor = torch.ops.quantized_decomposed.embedding_byte.dtype(
            self.codes, self.scales, None, *_INPUT, ids, dtype=torch.float32
        )
        return found
