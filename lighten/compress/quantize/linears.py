"""The arguments of a method: linears that read the same input, and the Gram of that input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lighten.compress.patterns import zeros_of
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.grid import Quantized


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

    def store(self, found: Quantized, store: Callable[[Quantized], Stored]) -> list[Stored]:
        """Returns each linear as `store` stores its outputs of what was found for all of them together."""
        stored, start = [], 0
        for weight in self.weights:
            stored.append(store(found.outputs(start, start := start + len(weight))))
        return stored
