"""The divergence of a model's next-token distributions from its source's, from the inputs of their heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lighten.compress.distill.ends import Behind, behind_of, head_of

ROWS = 128
"""Number of positions whose logits are in memory at a time."""


@dataclass
class Head:
    """What makes logits of the last hidden states."""

    weight: torch.Tensor
    """`[vocab, hidden]`"""
    bias: torch.Tensor | None
    behind: Behind | None
    """The model's own code behind its head: soft caps, scales."""

    @classmethod
    def of(cls, model: Any) -> Head:
        """Returns that of a model.

        Raises:
            RequestError: its head is no linear.
        """
        head = head_of(model)
        bias = None if head.bias is None else head.bias.detach()
        return cls(head.weight.detach(), bias, behind_of(model))

    def raw(self, states: torch.Tensor) -> torch.Tensor:
        """Returns what the head itself gives, float32 `[positions, vocab]`."""
        found = (states.to(self.weight.dtype) @ self.weight.t()).float()
        return found if self.bias is None else found.add_(self.bias)


def divergence(
    ours: tuple[Head, torch.Tensor],
    theirs: tuple[Head, torch.Tensor],
    temperature: float = 1.0,
    scale: float | None = None,
) -> tuple[float, torch.Tensor | None]:
    """Returns the sum of KL(theirs ‖ ours) over positions, and its derivative by our states.

    Logits of a few positions are in memory at a time, and their derivatives take their place.

    Args:
        ours: a head and its inputs `[positions, hidden]`.
        theirs: the same of the source.
        temperature: T, which divides the logits of both.
        scale: factor of T² · KL before its derivative; None if that is not wanted.
    """
    total, states = 0.0, ours[1].detach()
    derived = None if scale is None else torch.empty_like(states)
    for start in range(0, len(states), ROWS):
        rows = slice(start, start + ROWS)
        with torch.no_grad():
            wanted = theirs[0].raw(theirs[1][rows])
            wanted = theirs[0].behind(wanted) if theirs[0].behind else wanted
            wanted = torch.log_softmax(wanted.div_(temperature), -1)
            given = made = ours[0].raw(states[rows])
        if ours[0].behind:
            with torch.enable_grad():
                made = ours[0].behind(given.requires_grad_())
        with torch.no_grad():
            said = torch.log_softmax(made.detach() / temperature, -1)
            likely = wanted.exp()
            total += float((likely * wanted.sub_(said)).sum())
        if derived is None or scale is None:
            continue
        change = said.exp_().sub_(likely).mul_(temperature * scale)
        if ours[0].behind:
            (change,) = torch.autograd.grad(made, given, change.to(made.dtype))
        derived[rows] = change.to(ours[0].weight.dtype) @ ours[0].weight
    return total, derived
