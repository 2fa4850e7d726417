"""What a student learns from: the teacher's distribution, the next token, and the teacher's hidden states.

L = α · T² · KL(teacher ‖ student) + (1 − α) · CE, as in Hinton et al., "Distilling the Knowledge in a Neural Network"
(2015). A stored teacher has the k likeliest tokens, and the mass of all other tokens together. Then the divergence is
that of distributions over k + 1 outcomes, which is never more than the full divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from lighten.compress.distill.ends import Behind

ROWS = 512
"""Number of positions whose logits are in memory at a time."""
SMALLEST_REST = 1e-6
"""Minimum probability of all unknown tokens together."""
TINY = 1e-38


@dataclass(frozen=True)
class Targets:
    """The known part of the teacher's distribution at a number of positions, at some temperature."""

    tokens: torch.Tensor
    """Likeliest tokens, `[positions, k]`."""
    log_probs: torch.Tensor
    """Log-probabilities of `tokens`, `[positions, k]`."""
    rest: torch.Tensor
    """Log of the mass of all other tokens, `[positions]`."""

    def __getitem__(self, rows: slice) -> Targets:
        return Targets(self.tokens[rows], self.log_probs[rows], self.rest[rows])


class Said(Protocol):
    """A teacher's distributions at a number of positions: those of some, in part or whole (as log-softmax)."""

    def __getitem__(self, rows: slice) -> Targets | torch.Tensor: ...


def top(logits: torch.Tensor, count: int, temperature: float) -> Targets:
    """Returns the `count` likeliest tokens of logits `[positions, vocab]` and the rest of the mass."""
    log_probs = functional.log_softmax(logits.float() / temperature, -1)
    best, tokens = log_probs.topk(count)
    return Targets(tokens, best, log_rest(best))


def log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Returns log(1 − Σ exp), finite where nothing is left."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - SMALLEST_REST))


def top_divergence(student: torch.Tensor, teacher: Targets) -> torch.Tensor:
    """Returns KL(teacher ‖ student) of every position over the known tokens and the rest; `student` is log-softmax."""
    chosen = student.gather(-1, teacher.tokens)
    known = teacher.log_probs.exp() * (teacher.log_probs - chosen)
    return known.sum(-1) + teacher.rest.exp() * (teacher.rest - log_rest(chosen))


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Returns KL(teacher ‖ student) of every position; both are log-softmax, `[positions, vocab]`."""
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@dataclass
class Sums:
    """Losses added up over positions."""

    kl: float = 0.0
    ce: float = 0.0
    positions: int = 0

    def add(self, other: Sums) -> None:
        """Adds the sums of another."""
        self.kl += other.kl
        self.ce += other.ce
        self.positions += other.positions


def head_loss(
    hidden: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    teacher: Said | None,
    *,
    alpha: float,
    temperature: float,
    scale: float,
    dtype: torch.dtype = torch.float32,
    behind: Behind | None = None,
) -> tuple[torch.Tensor, Sums]:
    """Returns the derivative of the loss by the last hidden states, and the parts of the loss.

    Logits of a few positions are in memory at a time, and their derivatives take their place; autograd would keep
    several copies. The derivatives by the head's weight are added to its `grad`.

    Args:
        hidden: `[positions, hidden]`, for the derivative.
        head: the output head.
        labels: `[positions]`, the tokens to predict.
        teacher: its distributions, or None.
        alpha: share of the divergence in the loss.
        temperature: T.
        scale: factor of the loss before its derivative: 1 / positions of the step, and a gradient scale.
        dtype: type that the products are computed in.
        behind: what the model's own code makes of the head's outputs; None if nothing.
    """
    sums = Sums(positions=len(labels))
    weight = head.weight.detach().to(dtype)
    derived = torch.empty_like(hidden)
    for start in range(0, len(labels), ROWS):
        rows = slice(start, start + ROWS)
        states = hidden.detach()[rows].to(dtype)
        logits = (states @ weight.t()).float()
        if head.bias is not None:
            logits += head.bias.detach().float()
        given = logits.requires_grad_() if behind else logits
        made = given
        if behind:
            with torch.enable_grad():
                made = behind(given)
            logits = made.detach().float().clone()
        share = alpha if teacher is not None else 0.0
        change = torch.zeros((), device=hidden.device)
        if teacher is not None:
            soft = torch.softmax(logits if temperature == 1 else logits / temperature, -1)
            kl, change = _divergence_gradient(soft, teacher[rows])
            sums.kl += kl
        plain = torch.softmax(logits, -1, out=logits)
        likely = plain.gather(-1, labels[rows, None])
        sums.ce -= float(likely.clamp(min=TINY).log().sum())
        plain.scatter_add_(-1, labels[rows, None], -torch.ones_like(likely))
        change = plain.mul_((1 - share) * scale).add_(change, alpha=share * temperature * scale)
        if behind:
            (change,) = torch.autograd.grad(made, given, change.to(made.dtype))
        _add_to(head.bias, change.sum(0) if head.bias is not None else change)
        change = change.to(dtype)
        derived[rows] = change @ weight
        if head.weight.requires_grad:
            _add_to(head.weight, change.t() @ states)
    return derived, sums


def _add_to(parameter: torch.Tensor | None, found: torch.Tensor) -> None:
    """Adds a derivative to a parameter's `grad`, if there is such a parameter and it is trained."""
    if parameter is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = found.to(parameter.dtype)
    else:
        parameter.grad += found


def _divergence_gradient(student: torch.Tensor, part: Targets | torch.Tensor) -> tuple[float, torch.Tensor]:
    """Returns the sum of KL(teacher ‖ student), and its derivative by the logits in units of 1 / T.

    q are the student's probabilities (`student`, which is overwritten). The derivative is q − p for every known token.
    For all other tokens it is q · (1 − p_rest / q_rest), because only their mass together is known.
    """
    if not isinstance(part, Targets):
        kl = (part.exp() * (part - student.clamp(min=TINY).log())).sum()
        return float(kl), student.sub_(part.exp())
    known, rest = part.log_probs.exp(), part.rest.exp()
    chosen = student.gather(-1, part.tokens)
    left = (1 - chosen.sum(-1)).clamp(min=SMALLEST_REST)
    kl = (known * (part.log_probs - chosen.clamp(min=TINY).log())).sum() + (rest * (part.rest - left.log())).sum()
    factor = 1 - rest / left
    student.mul_(factor[:, None])
    student.scatter_(-1, part.tokens, chosen - known)
    return float(kl), student


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, projection: torch.nn.Module) -> torch.Tensor:
    """Returns the mean squared distance of projected hidden states from the teacher's, in units of its variance."""
    wide = teacher.float()
    distance: torch.Tensor = (projection(student).float() - wide).square().mean()
    return distance / wide.var().clamp(min=1e-12)
