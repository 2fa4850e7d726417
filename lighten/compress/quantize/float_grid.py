"""4-bit floats in blocks: the scales that a format can store, the search for the best, and what was found.

Weights are `[in, out]` here, the transpose of a linear's, so that a block of inputs is a block of whole rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from lighten.model import e2m1

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
ROOM = 1.5
"""How far above the scale that the largest weight asks for a search may go: then that weight has the code of 4, not 6.
"""


class Scales(Protocol):
    """The scales that a format can store, numbered from the smallest to the largest."""

    @property
    def size(self) -> int:
        """Inputs that share one."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers that a search adds to the usual one, that first which is taken if all are as good."""
        ...

    @property
    def divisor(self) -> float | None:
        """What stored scales are divided by."""
        ...

    def usual(self, largest: torch.Tensor) -> torch.Tensor:
        """Returns the number of the scale that the largest weight of a block asks for, int32."""
        ...

    def moved(self, numbers: torch.Tensor, step: int) -> torch.Tensor:
        """Returns the numbers of scales further up or down."""
        ...

    def value(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns scales by their numbers, float32."""
        ...

    def stored(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns scales as they are stored."""
        ...


@dataclass(frozen=True)
class Nvfp4Scales:
    """Positive E4M3 numbers over a divisor that all blocks share.

    The divisor is a power of two: then every weight is exact in bfloat16, and so the same in every program.
    """

    divisor: float
    size: int = 16
    steps: tuple[int, ...] = (0, *range(-8, 0), *range(1, 6))

    @staticmethod
    def of(weight: torch.Tensor) -> Nvfp4Scales:
        """Returns the scales for a weight: the divisor leaves room to search above its largest block."""
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if not largest > 0 or not math.isfinite(largest):
            return Nvfp4Scales(1.0)
        return Nvfp4Scales(2.0 ** math.floor(math.log2(FP8_LARGEST / ROOM * e2m1.LARGEST / largest)))

    def usual(self, largest: torch.Tensor) -> torch.Tensor:
        """See `Scales`."""
        wanted = (largest * (self.divisor / e2m1.LARGEST)).clamp_(max=FP8_LARGEST)
        return wanted.to(FP8).view(torch.uint8).int().clamp_(min=1)

    def moved(self, numbers: torch.Tensor, step: int) -> torch.Tensor:
        """See `Scales`. The largest is 448, the next number is NaN."""
        return (numbers + step).clamp_(1, 126)

    def value(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Scales`."""
        return self.stored(numbers).float() / self.divisor

    def stored(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Scales`: E4M3."""
        return numbers.to(torch.uint8).view(FP8)


@dataclass(frozen=True)
class Mxfp4Scales:
    """Powers of two, numbered by their exponent plus 127 (E8M0)."""

    divisor: None = None
    size: int = 32
    steps: tuple[int, ...] = (0, -1, 1)

    def usual(self, largest: torch.Tensor) -> torch.Tensor:
        """See `Scales`: the largest weight comes to lie between 3.5 and 7."""
        fraction, exponent = torch.frexp(largest)
        floor = exponent - 1 + (fraction >= 0.875).int()
        return (floor - 2 + e2m1.BIAS).clamp_(1, 252)

    def moved(self, numbers: torch.Tensor, step: int) -> torch.Tensor:
        """See `Scales`. Six times the largest is still a float32."""
        return (numbers + step).clamp_(1, 252)

    def value(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Scales`."""
        return e2m1.powers_of(numbers)

    def stored(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Scales`: E8M0."""
        return numbers.to(torch.uint8)


@dataclass
class Blocked:
    """4-bit floats of a weight matrix, and their scales."""

    values: torch.Tensor
    """`[in, out]`, values that codes have, float32."""
    numbers: torch.Tensor
    """`[blocks, out]`, numbers of the scales."""
    scales: Scales
    damping: float = 0.0
    """Share of the mean of diag(H) that was added to it."""

    def weight(self) -> torch.Tensor:
        """Returns the weight that they stand for, `[out, in]`."""
        by_block = self.scales.value(self.numbers).repeat_interleave(self.scales.size, 0)
        return (self.values * by_block).t()

    def outputs(self, start: int, stop: int) -> Blocked:
        """Returns some of the outputs: one linear of those that were rounded together."""
        part = slice(start, stop)
        return Blocked(self.values[:, part], self.numbers[:, part], self.scales, self.damping)


def rounded(w: torch.Tensor, scales: Scales, numbers: torch.Tensor) -> Blocked:
    """Rounds a weight `[in, out]` to nearest with scales of the given numbers, `[blocks, out]`."""
    by_block = scales.value(numbers)[:, None]
    values = e2m1.nearest(w.reshape(len(numbers), scales.size, -1) / by_block).reshape(w.shape)
    return Blocked(values, numbers, scales)


def usual(w: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Returns the numbers of the scales that the largest weight of each block asks for, `[blocks, out]`."""
    return scales.usual(w.reshape(-1, scales.size, w.shape[1]).abs().amax(1))


def searched(w: torch.Tensor, scales: Scales, gram: torch.Tensor) -> torch.Tensor:
    """Returns the numbers of the scales with the least error of the outputs that read each block alone.

    Args:
        w: `[in, out]`, float32.
        scales: those that can be stored.
        gram: H of the inputs, `[in, in]`; its blocks on the diagonal are used.

    Returns:
        For every block and output the number whose rounding error e has the least eᵀHe, `[blocks, out]`.
    """
    size = scales.size
    blocks = w.reshape(-1, size, w.shape[1])
    moments = torch.stack([gram[start : start + size, start : start + size] for start in range(0, len(w), size)])
    first = usual(w, scales)
    best, least = first, torch.full(first.shape, torch.inf, device=w.device)
    for step in scales.steps:
        numbers = scales.moved(first, step)
        by_block = scales.value(numbers)[:, None]
        error = e2m1.nearest(blocks / by_block).mul_(by_block).sub_(blocks)
        lost = torch.bmm(moments, error).mul_(error).sum(1)
        better = lost < least
        least, best = torch.where(better, lost, least), torch.where(better, numbers, best)
    return best
