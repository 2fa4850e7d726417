"""Quantized weights in the form of onnxruntime's operators.

`MatMulNBits` takes a weight `[out, in]` as codes in blocks along the inputs, packed lowest bits first, with a scale and
a zero point for every block. Everything that a GPTQ or AWQ checkpoint stores fits into it without a change of value.
Groups are cut into blocks whose length is a power of two. 3-bit codes take the place of 4-bit codes. If groups are not
runs of neighbouring inputs, a `Gather` puts the inputs in order first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lighten.errors import Failure, RequestError
from lighten.model.formats import FORMATS
from lighten.model.quantized.packed import Codes

if TYPE_CHECKING:
    from lighten.model.checkpoint import Checkpoint

BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Packed:
    """The inputs of a `MatMulNBits`."""

    blocks: torch.Tensor
    """`[out, blocks, bytes]`, uint8."""
    scales: torch.Tensor
    """`[out, blocks]`."""
    zeros: torch.Tensor | None
    """Zero points, `[out, bytes]`, uint8; None if all are in the middle."""
    order: torch.Tensor | None
    """Input for each place, `[in]`; None if they stay."""
    bits: int
    block_size: int
    inputs: int

    @property
    def outputs(self) -> int:
        """Number of rows of the weight."""
        return len(self.blocks)

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales (in float32) and zero points."""
        return self.blocks.numel() + 4 * self.scales.numel() + (0 if self.zeros is None else self.zeros.numel())


class Quantized:
    """The quantized linears of a GPTQ or AWQ checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Lists the linears.

        Raises:
            RequestError: the layout is not known.
        """
        self.checkpoint = checkpoint
        settings = checkpoint.quantization or {}
        self.method = str(settings.get("quant_method"))
        self.packed = FORMATS[self.method].unpacked(settings)
        if reason := self.packed.refusal():
            raise RequestError(f"{checkpoint.path}: this {self.method} checkpoint cannot be read ({reason})")
        self.names = self.packed.linears(checkpoint.weight_map)

    def codes(self, name: str) -> Codes:
        """Returns one linear."""
        return self.packed.codes(self.checkpoint.tensors(f"{name}."))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns `[out, in]` of one linear."""
        return self.packed.shape(name, self._shapes, self.checkpoint.tensor)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.checkpoint.shapes()

    def layout(self, name: str) -> tuple[Any, ...]:
        """Returns the properties that linears must share to be in one `MatMulNBits`."""
        shard = self.checkpoint.tensors(f"{name}.")
        order = tuple(shard["g_idx"].tolist()) if "g_idx" in shard else ()
        return len(shard["qweight"]), len(shard["scales"]), order


def pack(found: Codes, where: str) -> Packed:
    """Returns a linear in blocks, with every weight unchanged.

    Raises:
        Failure: groups cannot be cut into blocks.
    """
    order = None
    g_idx = found.g_idx
    if (g_idx.diff() < 0).any():
        order = torch.argsort(g_idx, stable=True)
        g_idx = g_idx[order]
    block_size = next((size for size in BLOCKS if _uniform(g_idx, size)), None)
    if block_size is None:
        raise Failure(f"{where} has groups that cannot be cut into blocks of 16 inputs: onnxruntime cannot run them")
    groups = g_idx[::block_size]
    codes = (found.codes if order is None else found.codes[order]).t()
    bits = 4 if found.bits == 3 else found.bits
    zeros = found.zeros[groups].t()
    middle = bool((zeros == 1 << (bits - 1)).all())
    return Packed(
        _bytes(torch.nn.functional.pad(codes, (0, -codes.shape[1] % block_size)), bits).view(
            len(codes), len(groups), block_size * bits // 8
        ),
        found.scales[groups].t().float().contiguous(),
        None if middle else _bytes(zeros, bits),
        order,
        bits,
        block_size,
        codes.shape[1],
    )


def join(parts: list[Packed]) -> Packed:
    """Returns linears with the same inputs as one, with their outputs one after the other."""
    first = parts[0]
    zeros = None
    if any(part.zeros is not None for part in parts):
        middle = {2: 0b10101010, 4: 0x88, 8: 0x80}[first.bits]
        width = -(-first.scales.shape[1] * first.bits // 8)
        filled = [torch.full((part.outputs, width), middle, dtype=torch.uint8) for part in parts]
        zeros = torch.cat(
            [filler if part.zeros is None else part.zeros for part, filler in zip(parts, filled, strict=True)]
        )
    return Packed(
        torch.cat([part.blocks for part in parts]),
        torch.cat([part.scales for part in parts]),
        zeros,
        first.order,
        first.bits,
        first.block_size,
        first.inputs,
    )


def rounded(weight: torch.Tensor, bits: int, block_size: int) -> Packed:
    """Returns a weight `[out, in]` rounded to the nearest codes without zero points, with a scale for every block.

    The weight of a block that is farthest from zero has the code that is farthest from zero. Only weights that are as
    far on the other side are clipped.
    """
    inputs, half = weight.shape[1], 1 << (bits - 1)
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % block_size)).view(len(weight), -1, block_size)
    scales = padded.gather(-1, padded.abs().argmax(-1, keepdim=True)) / -half
    codes = (padded / torch.where(scales == 0, 1, scales)).round().clamp(-half, half - 1) + half
    packed = _bytes(codes.flatten(0, 1), bits).view(len(weight), scales.shape[1], -1)
    return Packed(packed, scales[..., 0].contiguous(), None, None, bits, block_size, inputs)


def _uniform(g_idx: torch.Tensor, block_size: int) -> bool:
    """Returns whether no block crosses the border of two groups."""
    padded = torch.cat([g_idx, g_idx[-1:].expand(-len(g_idx) % block_size)]).view(-1, block_size)
    return bool((padded == padded[:, :1]).all())


def _bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes `[rows, columns]` into bytes along the columns, lowest bits first."""
    each = 8 // bits
    filled = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    packed = torch.zeros(filled.shape[:2], dtype=torch.uint8)
    for place in range(each):
        packed |= filled[..., place] << (place * bits)
    return packed
