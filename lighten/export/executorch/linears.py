"""Linears and embeddings as integer codes, spelled as XNNPACK's partitioner and ExecuTorch's kernels know them.

A weight `[out, in]` of 4 bits is codes from -8 to 7 with a scale above zero for every group of inputs, which XNNPACK
keeps in bfloat16. One of 8 bits has a scale for every output. There are no zero points. What a checkpoint has instead,
zero points or scales below zero, is a constant for every group: it is multiplied with the sum of the group's inputs, in
float32. Inputs are rounded to 8 bits, every token with a scale and a zero point of its own, while the
program runs: all together, or in two parts (see `inputs`). Each may be divided by a number of its own before, by which
its weights were multiplied before they were rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from lighten.errors import Failure
from lighten.export.executorch.inputs import HIGH, LOW, Way
from lighten.export.executorch.settings import SMALLEST_GROUP
from lighten.model.quantized.packed import Codes
from lighten.numerics.columns import Columns

DAMPING = 0.05
"""Share of the mean of diag(H) that is added to it."""
_SHARED: list[dict[tuple[int, Hashable], tuple[torch.Tensor, torch.Tensor]]] = []
"""What was computed from a tensor, by its identity and a name, with the tensor, so that no other gets its identity."""


@contextmanager
def shared() -> Iterator[None]:
    """Inside of it, linears that take the same inputs round them once."""
    _SHARED.append({})
    try:
        yield
    finally:
        _SHARED.pop()


def _once(inputs: torch.Tensor, name: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    if not _SHARED:
        return compute()
    if (id(inputs), name) not in _SHARED[-1]:
        _SHARED[-1][id(inputs), name] = inputs, compute()
    return _SHARED[-1][id(inputs), name][1]


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
    even: torch.Tensor | None = None
    """What every input is divided by before its product, `[in]`, above zero, in the order of the codes; None if nothing
    is."""

    @property
    def size(self) -> int:
        """Inputs of a group."""
        return self.codes.shape[1] // self.scales.shape[1]

    def coded(self) -> torch.Tensor:
        """Returns the weight for divided inputs without its offsets, `[out, in]` in float32, in the codes' order."""
        return self.codes.float() * self.scales.repeat_interleave(self.size, 1)

    def weight(self) -> torch.Tensor:
        """Returns the weight, `[out, in]` in float32, for inputs in their first order that are not divided."""
        placed = self.coded()
        if self.offsets is not None:
            placed += self.offsets.repeat_interleave(self.size, 1)
        if self.even is not None:
            placed /= self.even
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


def rounded(weight: torch.Tensor, bits: int, size: int | None, even: torch.Tensor | None = None) -> Stored:
    """Returns a weight `[out, in]` rounded to the nearest codes, by the smallest scales that clip nothing.

    Args:
        weight: any floats.
        bits: 4 or 8.
        size: inputs of a group, which divides them; None for one scale for each output.
        even: what its inputs are divided by, `[in]`; None if nothing is.
    """
    grouped = _multiplied(weight, even).reshape(len(weight), -1, size or weight.shape[1])
    most = 1 << (bits - 1)
    scales = torch.maximum(grouped.amax(-1) / (most - 1), grouped.amin(-1) / -most)
    scales = scales if size is None else _shortened(scales)
    scales = torch.where(scales == 0, 1, scales)  # XNNPACK refuses 0
    codes = (grouped / scales[..., None]).round().clamp(-most, most - 1)
    return Stored(codes.flatten(1).to(torch.int8), scales, None, bits, even=even)


def compensated(weight: torch.Tensor, gram: torch.Tensor, even: torch.Tensor | None = None) -> Stored:
    """Returns a weight `[out, in]` in 8 bits, one scale for each output; later columns make good for earlier errors.

    The columns of louder inputs come first.

    Args:
        weight: any floats.
        gram: XᵀX `[in, in]` of its inputs before they are divided.
        even: what they are divided by, `[in]`; None if nothing is.

    Raises:
        ArithmeticError: the Gram could not be factorised, or some inputs are always zero.
    """
    if not bool((gram.diagonal() > 0).all()):
        raise ArithmeticError("some inputs are always zero")
    weight = _multiplied(weight, even)
    gram = gram if even is None else gram / even / even[:, None]
    scales = rounded(weight, 8, None).scales
    order = gram.diagonal().argsort(descending=True)
    columns = Columns.of(weight, gram, DAMPING, order=lambda _: order)
    codes = torch.empty(weight.shape, dtype=torch.int8)

    def nearest(column: int) -> torch.Tensor:
        code = (columns.w[column] / scales[:, 0]).round().clamp(-128, 127)
        codes[:, order[column]] = code.to(torch.int8)
        return code * scales[:, 0]

    columns.round(nearest)
    return Stored(codes, scales, None, 8, even=even)


def _multiplied(weight: torch.Tensor, even: torch.Tensor | None) -> torch.Tensor:
    """Returns the weight `[out, in]` in float32, for divided inputs."""
    return weight.detach().float() if even is None else weight.detach().float() * even


def _shortened(scales: torch.Tensor) -> torch.Tensor:
    return scales.to(torch.bfloat16).float().contiguous()


class CodedLinear(nn.Module):
    """A linear whose inputs are rounded as it is run."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, stored: Stored, bias: torch.Tensor | None, way: Way | None = None) -> None:
        """Takes the weight, `[out]` or nothing to add, and how inputs are rounded.

        Raises:
            ValueError: inputs are set aside whose weights have several scales, or those of one scale have many levels.
        """
        super().__init__()
        self.out_features, self.in_features = stored.codes.shape
        self.bits, self.size = stored.bits, stored.size
        way = way or Way()
        self.edge = way.edge
        bias = torch.zeros(self.out_features) if bias is None and way.center is not None else bias
        if way.center is not None and bias is not None:
            bias = bias.detach().float() + stored.coded() @ way.center
        self.center = None if way.center is None else nn.Parameter(way.center, requires_grad=False)
        self.quieter = None
        if way.levels is not None:
            if bool((way.levels != way.levels[:: stored.size].repeat_interleave(stored.size)).any()):
                raise ValueError("inputs that share a scale are divided by one number")
            stored = replace(stored, scales=stored.scales * way.levels[:: stored.size])
            self.quieter = nn.Parameter(1 / way.levels, requires_grad=False)
        self.evener = None if stored.even is None else nn.Parameter(1 / stored.even, requires_grad=False)
        known = (way.center, way.levels, stored.even)
        self.names = [None if each is None else each.numpy().tobytes() for each in known]
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scales", stored.scales)
        self.register_buffer("zeros", torch.zeros_like(stored.scales, dtype=torch.int8))
        self.register_buffer("order", stored.order)
        self.far, self.picks, self.others = None, None, None
        if way.aside is not None:
            if stored.scales.shape[1] > 1:
                raise ValueError("inputs are set aside only where an output has one scale")
            self.far = CodedLinear(
                Stored(stored.codes[:, way.aside].contiguous(), stored.scales, None, self.bits), None
            )
            picks = nn.functional.one_hot(way.aside, self.in_features).float()
            self.picks = nn.Parameter(picks, requires_grad=False)
            self.others = nn.Parameter(1 - picks.sum(0), requires_grad=False)
        self.sums = self.offsets = None
        if stored.offsets is not None:  # a product with ones adds up groups: XNNPACK has no operator for it
            ones = torch.eye(stored.offsets.shape[1]).repeat_interleave(stored.size, 1)
            self.sums = nn.Parameter(ones, requires_grad=False)
            self.offsets = nn.Parameter(stored.offsets, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the product `[…, out]` for inputs `[…, in]`."""
        if self.order is not None:
            inputs = inputs.index_select(-1, self.order)
        if self.evener is not None:
            inputs = self._evened(inputs, self.evener)
        level, edge = self._levelled(inputs), self.edge
        if edge is not None:
            near = _once(level, ("near", edge), lambda: level.clamp(-edge, edge))
            far = _once(level, ("far", edge), lambda: level - near)
            found = self._product(near, self.bias) + self._product(far, None)
        elif self.far is not None and self.picks is not None and self.others is not None:
            near = level * self.others
            found = self._product(near, self.bias) + self.far(nn.functional.linear(level, self.picks))
        else:
            found = self._product(level, self.bias)
        if self.sums is not None and self.offsets is not None:
            sums = self.sums
            added = _once(inputs, ("sums", self.size), lambda: nn.functional.linear(inputs, sums))
            found = found + nn.functional.linear(added, self.offsets)
        return found

    def _evened(self, inputs: torch.Tensor, evener: torch.Tensor) -> torch.Tensor:
        return _once(inputs, ("even", self.names[2]), lambda: inputs * evener)

    def _levelled(self, inputs: torch.Tensor) -> torch.Tensor:
        center, quieter = self.center, self.quieter
        if center is not None:
            first = inputs
            inputs = _once(first, ("center", self.names[0]), lambda: first - center)
        if quieter is not None:
            loud = inputs
            inputs = _once(loud, ("levels", self.names[1]), lambda: loud * quieter)
        return inputs

    def _product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen = _once(inputs, "seen", lambda: _seen(inputs))
        half = 1 << (self.bits - 1)
        weight = torch.ops.torchao.dequantize_affine(
            self.codes, [1, self.size], self.scales, self.zeros, torch.int8, -half, half - 1, torch.float32
        )
        return nn.functional.linear(seen, weight, bias)


def _seen(inputs: torch.Tensor) -> torch.Tensor:
    """Returns inputs rounded to 8 bits by the operators that XNNPACK's partitioner knows."""
    block = [1] * (inputs.dim() - 1) + [inputs.shape[-1]]
    ops = torch.ops.torchao
    scale, zero = ops.choose_qparams_affine(
        inputs, "ASYMMETRIC", block, torch.int8, LOW, HIGH, None, torch.float32, torch.int8
    )
    codes = ops.quantize_affine(inputs, block, scale, zero, torch.int8, LOW, HIGH)
    found: torch.Tensor = ops.dequantize_affine(codes, block, scale, zero, torch.int8, LOW, HIGH, torch.float32)
    return found


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
            self.codes, self.scales, None, LOW, HIGH, ids, dtype=torch.float32
        )
        return found
