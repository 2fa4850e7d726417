"""The weight to round to when a linear reads inputs that earlier rounding has changed.

A layer of the quantized model reads inputs X̂ that earlier rounding has changed, while its outputs should still be those
of the source, which reads X. Its best unrounded weight is therefore not W but the one whose outputs on X̂ come closest
to WXᵀ. Per token, with Ĥ = X̂ᵀX̂ and D = (X − X̂)ᵀX̂, that is W + WDĤ⁻¹ (Arai and Ichikawa, "Quantization Error
Propagation", 2025; Li et al., "GPTAQ", 2025). How far to go, α between 0 and 1, is what is best on tokens that the sum
does not hold. Rounding then counts its errors on Ĥ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lighten.compress.calibrate.gram import accumulate
from lighten.model.grams import Gram
from lighten.model.products import exact_products
from lighten.numerics.damping import damped

HELD_OUT = 8
"""One token of so many is left out of the sums that the change of the weights is made from, to choose its size."""
AT_ONCE = 4096
"""Number of tokens that are summed at once."""
RIDGE = 0.01
"""Share of the mean of diag(Ĥ) that is added to it where the change of the weights is solved for."""


@dataclass
class Sums:
    """Sums over tokens of what a linear reads in both models."""

    read: Gram
    """Ĥ = X̂ᵀX̂."""
    moved: torch.Tensor
    """D = (X − X̂)ᵀX̂, `[in, in]`."""

    @staticmethod
    def empty(width: int, device: str) -> Sums:
        """Returns the sums of no tokens."""
        return Sums(Gram.empty(width, device), torch.zeros(width, width, device=device))

    def add(self, plain: torch.Tensor, quantized: torch.Tensor) -> None:
        """Adds the inputs of some tokens, `[tokens, in]`, of the source and of the quantized model."""
        accumulate(self.read, quantized)
        # the difference is small, so that its own rounding is of no weight, while that of XᵀX̂ − Ĥ would be
        change = (plain.float() - quantized.float()).to(quantized.dtype)
        with exact_products(torch.bfloat16):
            self.moved.add_((change.t() @ quantized).float())


@dataclass
class Both:
    """Sums over the tokens that a change of weights is made from, and over those that are held out of it."""

    known: Sums
    held: Sums
    _waiting: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)
    """Inputs that were not summed yet."""

    @staticmethod
    def empty(width: int, device: str) -> Both:
        """Returns the sums of no tokens."""
        return Both(Sums.empty(width, device), Sums.empty(width, device))

    def add(self, plain: torch.Tensor, quantized: torch.Tensor) -> None:
        """Adds the inputs of a batch in both models, `[tokens, in]`. Its last tokens are held out.

        Many are summed at once: adding to a sum takes as long as the product of a few hundred tokens.
        """
        self._waiting.append((plain, quantized))
        if sum(len(each) for each, _ in self._waiting) >= AT_ONCE:
            self.close()

    def close(self) -> None:
        """Sums what waits. Without it, the sums lack the last batches."""
        kept = [len(each) - len(each) // HELD_OUT for each, _ in self._waiting]
        for sums, parts in ((self.known, [slice(at) for at in kept]), (self.held, [slice(at, None) for at in kept])):
            both = [[pair[one][part] for pair, part in zip(self._waiting, parts, strict=True)] for one in (0, 1)]
            if any(map(len, both[0])):
                sums.add(*map(torch.cat, both))
        self._waiting.clear()

    def together(self) -> Gram:
        """Returns Ĥ of all tokens. The sums are of no more use then."""
        self.close()
        whole = self.known.read
        whole.blocks += self.held.read.blocks
        whole.tokens += self.held.read.tokens
        torch.maximum(whole.absmax, self.held.read.absmax, out=whole.absmax)
        return whole


def corrected(weight: torch.Tensor, gram: torch.Tensor, known: torch.Tensor, held: Sums) -> tuple[torch.Tensor, float]:
    """Returns the weight whose outputs on changed inputs come near to those of `weight` on the inputs of the source.

    Args:
        weight: `[out, in]`, of all linears that read the input.
        gram: Ĥ of the tokens of `known`, `[in, in]`.
        known: D of the tokens that the change is made from, `[in, in]`.
        held: sums of other tokens, on which α is chosen.

    Returns:
        The weight, float32, and α.

    Raises:
        ArithmeticError: Ĥ is not positive definite.
    """
    wide = weight.float()
    lower, failed = torch.linalg.cholesky_ex(damped(gram, RIDGE))
    if failed:
        raise ArithmeticError(f"not positive definite even with {RIDGE:g} of its mean diagonal added")
    change = torch.cholesky_solve((wide @ known).t(), lower).t()
    gain = float((change * (wide @ held.moved)).sum())
    cost = float(((change @ held.read.matrix()) * change).sum())
    alpha = min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
    return wide + alpha * change, alpha
