"""The weight to round to when a linear reads inputs that earlier rounding has changed.

A layer of the quantized model reads inputs X̂ that earlier rounding has changed, while its outputs should still be those
of the source, which reads X. Its best unrounded weight is therefore not W but the one whose outputs on X̂ come closest
to WXᵀ. Per token, with Ĥ = X̂ᵀX̂ and D = (X − X̂)ᵀX̂, that is W + WDĤ⁻¹ (Arai and Ichikawa, "Quantization Error
Propagation", 2025; Li et al., "GPTAQ", 2025). How far to go, α between 0 and 1, is what is best on tokens that the sum
does not hold. Rounding then counts its errors on Ĥ.

Where outputs are added to states R̂ that should be R, the weight can make good a part of R − R̂ too: with
F = (R − R̂)ᵀX̂ that is FĤ⁻¹, of which β is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lighten.model.grams import Gram
from lighten.model.products import exact_products
from lighten.numerics.damping import damped
from lighten.observe.gram import accumulate

HELD_OUT = 8
"""One token of so many is left out of the sums that the change of the weights is made from, to choose its size."""
AT_ONCE = 2048
"""Number of tokens that are summed at once: adding to a sum takes as long as the product of a few hundred tokens."""
RIDGE = 0.01
"""Share of the mean of diag(Ĥ) that is added to it where the change of the weights is solved for."""

Part = tuple[torch.Tensor, ...]
"""What a linear reads in the source and in the quantized model, `[tokens, in]` each; and what its outputs are added to
in both, `[tokens, out]` each, if that is known."""


@dataclass
class Sums:
    """Sums over tokens of what a linear reads. Some tokens run in the quantized model alone."""

    known: Gram
    """Ĥ = X̂ᵀX̂ of the tokens that the change of the weights is made from."""
    moved: torch.Tensor
    """D = (X − X̂)ᵀX̂ of the same tokens, `[in, in]`."""
    rest: Gram
    """Ĥ of all others."""
    missing: torch.Tensor | None = None
    """F = (R − R̂)ᵀX̂ of the same tokens, `[out, in]`, if it is known what the outputs are added to."""
    held: list[Part] = field(default_factory=list)
    """Inputs of the tokens on which the size of the change is chosen. They are parts of what was added."""
    _pairs: list[Part] = field(default_factory=list, repr=False)
    _others: list[torch.Tensor] = field(default_factory=list, repr=False)
    """What was not summed yet."""

    @staticmethod
    def empty(width: int, device: str) -> Sums:
        """Returns the sums of no tokens."""
        return Sums(Gram.empty(width, device), torch.zeros(width, width, device=device), Gram.empty(width, device))

    def add(self, plain: torch.Tensor | None, quantized: torch.Tensor, *beside: torch.Tensor) -> None:
        """Adds the inputs of a batch, `[tokens, in]`, in the source and in the quantized model.

        The last tokens of a batch are held out. `plain` is None for a batch that the source does not run. `beside` is
        R and R̂, `[tokens, out]`: what the outputs are added to in both models.
        """
        if plain is None:
            self._others.append(quantized)
        else:
            kept = len(quantized) - len(quantized) // HELD_OUT
            part = (plain, quantized, *beside)
            self._pairs.append(tuple(each[:kept] for each in part))
            if kept < len(quantized):
                self.held.append(tuple(each[kept:] for each in part))
                self._others.append(quantized[kept:])
        if sum(len(part[0]) for part in self._pairs) >= AT_ONCE:
            self._sum_pairs()
        if sum(map(len, self._others)) >= AT_ONCE:
            self._sum_others()

    def _sum_pairs(self) -> None:
        if not self._pairs:
            return
        plain, quantized, *beside = (torch.cat(each) for each in zip(*self._pairs, strict=True))
        self._pairs.clear()
        accumulate(self.known, quantized)
        # the difference is small, so that its own rounding is of no weight, while that of XᵀX̂ − Ĥ would be
        self.moved.add_(_differing(plain, quantized, quantized))
        if beside:
            missing = _differing(beside[0], beside[1], quantized)
            self.missing = missing if self.missing is None else self.missing.add_(missing)

    def _sum_others(self) -> None:
        if self._others:
            accumulate(self.rest, torch.cat(self._others))
        self._others.clear()

    def close(self) -> None:
        """Sums what waits. Without it, the sums lack the last batches."""
        self._sum_pairs()
        self._sum_others()

    def together(self) -> Gram:
        """Returns Ĥ of all tokens. The sums are of no more use then."""
        self.close()
        whole = self.known
        whole.blocks += self.rest.blocks
        whole.tokens += self.rest.tokens
        torch.maximum(whole.absmax, self.rest.absmax, out=whole.absmax)
        return whole


def corrected(weight: torch.Tensor, sums: Sums) -> tuple[torch.Tensor, list[float]]:
    """Returns the weight whose outputs on changed inputs come near to those of `weight` on the inputs of the source.

    Args:
        weight: `[out, in]`, of all linears that read the input.
        sums: over what they read. Without tokens that are held out, nothing is changed.

    Returns:
        The weight, float32, and α; β too, if it is known what the outputs are added to.

    Raises:
        ArithmeticError: Ĥ is not positive definite.
    """
    sums.close()
    wide = weight.float()
    lower, failed = torch.linalg.cholesky_ex(damped(sums.known.matrix(), RIDGE))
    if failed:
        raise ArithmeticError(f"not positive definite even with {RIDGE:g} of its mean diagonal added")
    moments = [wide @ sums.moved, *([] if sums.missing is None else [sums.missing])]
    changes = [torch.cholesky_solve(each.t(), lower).t() for each in moments]
    shares = [0.0] * len(changes)
    if sums.held:
        plain, quantized, *beside = (torch.cat(each) for each in zip(*sums.held, strict=True))
        target = wide @ _differing(plain, quantized, quantized)
        if beside:
            target += _differing(beside[0], beside[1], quantized)
        gram = (quantized.t() @ quantized).float()
        shares = _shares(changes, target, gram)
    for share, change in zip(shares, changes, strict=True):
        wide = torch.add(wide, change, alpha=share)
    return wide, shares


def _shares(changes: list[torch.Tensor], target: torch.Tensor, gram: torch.Tensor) -> list[float]:
    """Returns how much of each change to take, between 0 and 1, so that `target` is met best on other tokens."""
    reached = [change @ gram for change in changes]
    gains = torch.stack([(change * target).sum() for change in changes]).double()
    costs = torch.stack([torch.stack([(one * other).sum() for other in changes]) for one in reached]).double()
    found = torch.zeros(len(changes), dtype=torch.float64)
    for _ in range(50):  # one after the other: of two that are alike, none leaves its bounds
        for number in range(len(changes)):
            if costs[number, number] > 0:
                others = costs[number] @ found - costs[number, number] * found[number]
                found[number] = ((gains[number] - others) / costs[number, number]).clamp(0, 1)
    return found.tolist()


def _differing(plain: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Returns the sum over tokens of what differs in two models, times the inputs of the second one."""
    with exact_products(torch.bfloat16):
        return ((plain - quantized).t() @ inputs).float()
