"""The arguments of a method: linears that read the same input, and the Gram of that input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import torch

from lighten.compress.patterns import zeros_of
from lighten.compress.quantize.formats import Stored


class Rounded(Protocol):
    """What was found for linears that were rounded together."""

    def outputs(self, start: int, stop: int) -> Self:
        """Returns some of the outputs: one linear."""
        ...


Found = TypeVar("Found", bound=Rounded)


@dataclass
class Findings:
    """The findings about the quantization of one layer, or of several."""

    bits: dict[str, int] = field(default_factory=dict)
    """Bits of every linear that was quantized, by full name."""
    kept: list[dict[str, str]] = field(default_factory=list)
    """Linears that were left alone, and why."""
    errors: dict[str, float] = field(default_factory=dict)
    """Share of the output's energy that was lost, by the first of the linears that read the same input."""
    fallbacks: list[str] = field(default_factory=list)
    """Linears that were rounded to nearest because their method could not round them."""
    warnings: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Takes over the findings of another."""
        self.bits |= other.bits
        self.errors |= other.errors
        self.kept += other.kept
        self.fallbacks += other.fallbacks
        self.warnings += other.warnings


@dataclass
class Linears:
    """Linears that read the same input and get the same bits."""

    names: list[str]
    """Full names."""
    weights: list[torch.Tensor]
    """Weights, `[out, in]` each."""
    bits: int
    scale_type: torch.dtype
    """Type of stored scales."""
    findings: Findings
    moments: torch.Tensor | None = None
    """XᵀX `[in, in]` of their inputs, float32, for methods that are `swept`."""
    reader: str = ""
    """Name of their input in messages."""
    targets: list[torch.Tensor] | None = None
    """Weights to come close to, `[out, in]` each, instead of their own: they also make good what came before."""
    largest: float | None = None
    """The largest |x| of their input in the sweep, for settings with `reads_largest`."""

    @property
    def gram(self) -> torch.Tensor:
        """XᵀX `[in, in]` of their inputs, float32."""
        if self.moments is None:
            raise TypeError("this method reads Grams: its settings have to say so (swept = True)")
        return self.moments

    @property
    def together(self) -> torch.Tensor:
        """Weights of all linears on top of each other, `[out of all, in]`."""
        return torch.cat(self.weights)

    @property
    def target(self) -> torch.Tensor:
        """Weights to come close to, of all linears on top of each other, `[out of all, in]`."""
        return torch.cat(self.targets) if self.targets else self.together

    def pruned(self) -> torch.Tensor | None:
        """Returns which of all their weights were pruned, and so must stay zero; None if none were."""
        return zeros_of(self.weights)

    def note_fallback(self, error: ArithmeticError) -> None:
        """Notes that they are rounded to nearest, because the Gram of their input cannot be factorised."""
        self.findings.fallbacks.append(self.reader)
        self.findings.warnings.append(f"{self.reader}: rounded to nearest, for its Gram is {error}; give it more text")

    def note_damping(self, asked: float, used: float) -> None:
        """Notes it if more was added to the Gram of their input than was asked for."""
        if used != asked:
            self.findings.warnings.append(f"{self.reader}: damping raised from {asked:g} to {used:g}")

    def store(self, found: Found, store: Callable[[Found], Stored]) -> list[Stored]:
        """Returns each linear as `store` stores its outputs of what was found for all of them together."""
        stored, start = [], 0
        for weight in self.weights:
            stored.append(store(found.outputs(start, start := start + len(weight))))
        return stored
