"""ggml's types of blocks that hold codes on a grid: reading and writing their fields.

Every weight of a block is `d · scale · level[code] − dmin · min`. `d` and `dmin` belong to the block (256 weights of a
K-quant, 32 of the others), `scale` and `min` are small whole numbers of a part of it. The layouts are those of ggml's
`ggml-common.h`; `dequantize_row_…` in `ggml-quants.c` says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Bytes = torch.Tensor
"""uint8."""
Fields = dict[str, Bytes]
HALVES = ("d", "dmin", "m")
"""Names of the fields that are a float16."""


@dataclass(frozen=True)
class Plane:
    """Some bits of every code, in bytes that hold them of several codes."""

    field: str
    shape: tuple[int, ...]
    """Codes of a block as `[…, codes in a byte, bytes]`."""
    width: int
    """Number of bits of a code in it."""
    first: int = 0
    """Lowest bit of the code in it."""
    neighbours: bool = False
    """Whether neighbouring codes share a byte: `shape` is `[bytes, codes in a byte]` then."""

    def pack(self, codes: torch.Tensor) -> Bytes:
        """Returns the bytes `[…, bytes]` of codes `[…, block]`."""
        bits = (codes >> self.first & (1 << self.width) - 1).view(*codes.shape[:-1], *self.shape)
        return joined(bits.transpose(-1, -2) if self.neighbours else bits, self.width).flatten(codes.dim() - 1)

    def unpack(self, packed: Bytes) -> torch.Tensor:
        """Returns the bits `[…, block]` at their place in the codes."""
        shape = (*self.shape[:-2], self.shape[-2 if self.neighbours else -1])
        bits = apart(packed.reshape(*packed.shape[:-1], *shape), self.width)
        return (bits.transpose(-1, -2) if self.neighbours else bits).flatten(packed.dim() - 1) << self.first


def joined(parts: torch.Tensor, width: int) -> Bytes:
    """Returns bytes `[…, n]` of whole numbers `[…, 8 / width, n]`; the first takes the lowest bits."""
    shifts = torch.arange(parts.shape[-2], dtype=torch.uint8)[:, None] * width
    return (parts << shifts).sum(-2, dtype=torch.uint8)


def apart(packed: Bytes, width: int) -> torch.Tensor:
    """Returns the whole numbers `[…, 8 / width, n]` of bytes `[…, n]`, the inverse of `joined`."""
    shifts = torch.arange(8 // width, dtype=torch.uint8)[:, None] * width
    return packed[..., None, :] >> shifts & (1 << width) - 1


@dataclass
class Parts:
    """Whole numbers of the parts of blocks, `[…, parts]`, int16."""

    scales: torch.Tensor
    mins: torch.Tensor


def _nibbles_out(packed: Bytes) -> Parts:
    halves = apart(packed, 4).short()
    return Parts(halves[..., 0, :], halves[..., 1, :])


def _nibbles_in(parts: Parts) -> Bytes:
    return joined(torch.stack([parts.scales, parts.mins], -2).byte(), 4)


def _six_bits_out(packed: Bytes) -> Parts:
    """Eight scales and mins in twelve bytes: the last four of each have their upper bits in those of the first four."""
    first, second, rest = torch.split(packed, 4, -1)
    scales = torch.cat([first & 63, rest & 15 | (first >> 6 << 4)], -1)
    mins = torch.cat([second & 63, rest >> 4 | (second >> 6 << 4)], -1)
    return Parts(scales.short(), mins.short())


def _six_bits_in(parts: Parts) -> Bytes:
    (scales, more_scales), (mins, more_mins) = (torch.split(each.byte(), 4, -1) for each in (parts.scales, parts.mins))
    first, second = scales | (more_scales >> 4 << 6), mins | (more_mins >> 4 << 6)
    return torch.cat([first, second, more_scales & 15 | (more_mins & 15) << 4], -1)


def _signed_six_bits_out(packed: Bytes) -> Parts:
    """Sixteen scales in twelve bytes: eight bytes of lower halves, four of upper bits."""
    low, high = torch.split(packed, [8, 4], -1)
    scales = apart(low, 4).flatten(-2) | apart(high, 2).flatten(-2) << 4
    return _without_mins(scales.short() - 32)


def _signed_six_bits_in(parts: Parts) -> Bytes:
    scales = (parts.scales + 32).byte()
    blocks = scales.shape[:-1]
    low, high = (scales & 15).view(*blocks, 2, 8), (scales >> 4).view(*blocks, 4, 4)
    return torch.cat([joined(low, 4), joined(high, 2)], -1)


def _bytes_out(packed: Bytes) -> Parts:
    return _without_mins(packed.view(torch.int8).short())


def _bytes_in(parts: Parts) -> Bytes:
    return parts.scales.to(torch.int8).view(torch.uint8)


def _without_mins(scales: torch.Tensor) -> Parts:
    return Parts(scales, torch.zeros_like(scales))


@dataclass(frozen=True)
class Numbers:
    """How the whole numbers of a K-quant's parts are stored."""

    unpack: Callable[[Bytes], Parts]
    pack: Callable[[Parts], Bytes]
    scales: tuple[int, int]
    """Least and largest scale."""
    mins: tuple[int, int] = (0, 0)
    """Least and largest min."""


_NIBBLES = Numbers(_nibbles_out, _nibbles_in, (0, 15), (0, 15))
_SIX_BITS = Numbers(_six_bits_out, _six_bits_in, (0, 63), (0, 63))
_SIGNED_SIX_BITS = Numbers(_signed_six_bits_out, _signed_six_bits_in, (-32, 31))
_BYTES = Numbers(_bytes_out, _bytes_in, (-128, 127))


@dataclass(frozen=True)
class Kind:
    """The layout of one type."""

    fields: tuple[tuple[str, int], ...]
    """Name and number of bytes, in the order of the block. "d" and "dmin" are float16, "m" is −dmin."""
    planes: tuple[Plane, ...]
    levels: tuple[int, ...]
    """Level of every code."""
    part: int = 32
    """Number of weights that share a scale."""
    numbers: Numbers | None = None
    """How scales and mins of the parts are stored; None if a block is one part."""
    plus: int = 0
    """Added to what the planes hold, modulo 256, to get codes."""

    @property
    def block(self) -> int:
        """Number of weights of a block."""
        return 256 if self.numbers else 32

    @property
    def size(self) -> int:
        """Number of bytes of a block."""
        return sum(size for _, size in self.fields)

    @property
    def even(self) -> bool:
        """Whether levels are as far from each other as codes are."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1

    @property
    def has_mins(self) -> bool:
        """Whether a weight of code zero can be other than zero."""
        return sum(name in HALVES for name, _ in self.fields) > 1


@dataclass
class Grid:
    """The fields of a matrix `[out, in]`."""

    kind: Kind
    codes: torch.Tensor
    """`[out, in]`, uint8."""
    scales: torch.Tensor
    """`[out, in / part]`, int16."""
    mins: torch.Tensor
    """`[out, in / part]`, int16."""
    d: torch.Tensor
    """`[out, in / block]`, float16."""
    dmin: torch.Tensor
    """`[out, in / block]`, float16."""

    def steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what a level is multiplied by, and what is taken off: `[out, in / part]`, float32."""
        parts = self.kind.block // self.kind.part
        return (
            self.d.float().repeat_interleave(parts, 1) * self.scales,
            self.dmin.float().repeat_interleave(parts, 1) * self.mins,
        )

    def weight(self) -> torch.Tensor:
        """Returns the weights that it stands for, `[out, in]`, float32, bit for bit as ggml computes them."""
        step, off = (each.repeat_interleave(self.kind.part, 1) for each in self.steps())
        return torch.tensor(self.kind.levels, dtype=torch.float32)[self.codes.int()] * step - off


def unpack(packed: Bytes, kind: Kind) -> Grid:
    """Returns the fields of packed rows `[out, bytes of a row]`."""
    rows = len(packed)
    blocks = packed.view(rows, -1, kind.size)
    fields = dict(
        zip((name for name, _ in kind.fields), torch.split(blocks, [n for _, n in kind.fields], -1), strict=True)
    )
    codes = sum((plane.unpack(fields[plane.field]) for plane in kind.planes), torch.tensor(kind.plus).byte())
    d, zero = _halves(fields["d"]), torch.zeros(blocks.shape[:2], dtype=torch.float16)
    if kind.numbers:
        parts = kind.numbers.unpack(fields["scales"])
    else:
        parts = Parts(torch.ones(*blocks.shape[:2], 1).short(), torch.full((*blocks.shape[:2], 1), -1).short())
    off = next((_halves(fields[name]) for name in ("dmin", "m") if name in fields), zero)
    return Grid(kind, codes.flatten(1), parts.scales.flatten(1), parts.mins.flatten(1), d, off)


def pack(grid: Grid) -> Bytes:
    """Returns the packed rows `[out, bytes of a row]`, the inverse of `unpack`."""
    kind, rows = grid.kind, len(grid.codes)
    codes = (grid.codes - kind.plus).view(rows, -1, kind.block)
    halves = {"d": grid.d, "dmin": grid.dmin, "m": grid.dmin}
    found: Fields = {name: each.contiguous().view(torch.uint8).view(rows, -1, 2) for name, each in halves.items()}
    if kind.numbers:
        scales, mins = (each.view(rows, -1, kind.block // kind.part) for each in (grid.scales, grid.mins))
        found["scales"] = kind.numbers.pack(Parts(scales, mins))
    found |= {plane.field: plane.pack(codes) for plane in kind.planes}
    return torch.cat([found[name] for name, _ in kind.fields], -1).flatten(1)


def with_halves(packed: Bytes, kind: Kind, halves: Sequence[torch.Tensor]) -> Bytes:
    """Returns packed rows `[out, bytes of a row]` with another d, and another dmin (or m). Every other byte stays.

    Args:
        packed: the rows.
        kind: layout of the type.
        halves: float16 `[out, in / block]` each: d, and dmin if the type has mins.
    """
    made, left, start = packed.clone(), list(halves), 0
    blocks = made.view(len(packed), -1, kind.size)
    for name, size in kind.fields:
        if name in HALVES:
            half = left.pop(0).contiguous()
            blocks[..., start : start + size] = half.view(torch.uint8).view(*half.shape, size)
        start += size
    return made


def _halves(packed: Bytes) -> torch.Tensor:
    return packed.contiguous().view(torch.float16)[..., 0]


def _around(zero: int, bits: int) -> tuple[int, ...]:
    return tuple(range(-zero, (1 << bits) - zero))


_D, _DMIN, _M = ("d", 2), ("dmin", 2), ("m", 2)
_PAIRS = Plane("qs", (2, 16), 4)
_FIFTHS = Plane("qh", (4, 8), 1, first=4, neighbours=True)
_WIDE_PAIRS = Plane("qs", (4, 2, 32), 4)
_QUARTETS = Plane("qs", (2, 4, 32), 2)
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

KINDS: dict[str, Kind] = {
    "Q4_0": Kind((_D, ("qs", 16)), (_PAIRS,), _around(8, 4)),
    "Q4_1": Kind((_D, _M, ("qs", 16)), (_PAIRS,), _around(0, 4)),
    "Q5_0": Kind((_D, ("qh", 4), ("qs", 16)), (_PAIRS, _FIFTHS), _around(16, 5)),
    "Q5_1": Kind((_D, _M, ("qh", 4), ("qs", 16)), (_PAIRS, _FIFTHS), _around(0, 5)),
    "Q8_0": Kind((_D, ("qs", 32)), (Plane("qs", (1, 32), 8),), _around(128, 8), plus=128),
    "IQ4_NL": Kind((_D, ("qs", 16)), (_PAIRS,), _NONLINEAR),
    "Q2_K": Kind((("scales", 16), ("qs", 64), _D, _DMIN), (_QUARTETS,), _around(0, 2), 16, _NIBBLES),
    "Q3_K": Kind(
        (("hmask", 32), ("qs", 64), ("scales", 12), _D),
        (_QUARTETS, Plane("hmask", (8, 32), 1, first=2)),
        _around(4, 3),
        16,
        _SIGNED_SIX_BITS,
    ),
    "Q4_K": Kind((_D, _DMIN, ("scales", 12), ("qs", 128)), (_WIDE_PAIRS,), _around(0, 4), 32, _SIX_BITS),
    "Q5_K": Kind(
        (_D, _DMIN, ("scales", 12), ("qh", 32), ("qs", 128)),
        (_WIDE_PAIRS, Plane("qh", (8, 32), 1, first=4)),
        _around(0, 5),
        32,
        _SIX_BITS,
    ),
    "Q6_K": Kind(
        (("ql", 128), ("qh", 64), ("scales", 16), _D),
        (Plane("ql", (2, 2, 64), 4), Plane("qh", (2, 4, 32), 2, first=4)),
        _around(32, 6),
        16,
        _BYTES,
    ),
}
"""Layouts by the name of the type."""
