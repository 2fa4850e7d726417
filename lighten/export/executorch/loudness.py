"""How loud the inputs of linears are, on a text: what is rounded to 8 bits while a program runs is levelled by it.

Every token's inputs share one scale, so a loud input takes the digits of all others. Where the same few inputs are loud
for all tokens, they are set aside and not rounded. Where a group of inputs is louder than others, a power of two goes
from them to the scales of their weights, which changes no code. Where other inputs are loud for other tokens, what lies
far out is rounded apart from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SAMPLES, LENGTH = 2, 512
"""Sequences that are read, and tokens of each."""
LOUD, MOST = 2.5, 32
"""Inputs of more than so many times the mean size of the middle one are set aside, so many at most."""


@dataclass(frozen=True)
class Loudness:
    """What a linear takes in."""

    inputs: torch.Tensor
    """Mean size of each input, `[in]`, in the order that was asked for."""
    aside: torch.Tensor | None
    """The loudest inputs, `[k]`; None if none is loud."""
    groups: torch.Tensor
    """Mean over the tokens of the largest input of each group that is not set aside, `[groups]`."""
    crest: float
    """Mean over the tokens of the largest input over the mean one, after the groups are levelled."""


@torch.no_grad()
def listen(
    model: Any, ids: torch.Tensor, asked: Mapping[nn.Linear, tuple[torch.Tensor | None, int]]
) -> dict[nn.Linear, Loudness]:
    """Returns the loudness of linears.

    Args:
        model: a causal model.
        ids: tokens, `[samples, length]`.
        asked: for each linear, the order of its inputs, and how many of them share a scale.
    """
    means = {linear: torch.zeros(linear.in_features) for linear in asked}
    groups = {linear: torch.zeros(linear.in_features // size) for linear, (_, size) in asked.items()}
    crests = dict.fromkeys(asked, 0.0)
    aside: dict[nn.Linear, torch.Tensor | None] = {}

    def sized(linear: Any, inputs: torch.Tensor) -> torch.Tensor:
        order = asked[linear][0]
        flat = inputs.reshape(-1, inputs.shape[-1]).abs().float()
        found = flat if order is None else flat[:, order]
        if (loud := aside.get(linear)) is not None:
            found = found.index_fill(1, loud, 0)
        return found

    def grouped(linear: Any, inputs: torch.Tensor) -> torch.Tensor:
        return sized(linear, inputs).reshape(-1, len(groups[linear]), asked[linear][1])

    def first(linear: Any, inputs: Any) -> None:
        means[linear] += sized(linear, inputs[0]).sum(0) / ids.numel()

    def second(linear: Any, inputs: Any) -> None:
        groups[linear] += grouped(linear, inputs[0]).amax(2).sum(0) / ids.numel()

    def third(linear: Any, inputs: Any) -> None:
        level = grouped(linear, inputs[0]) / steps(groups[linear])[:, None]
        crests[linear] += float((level.amax((1, 2)) / level.mean((1, 2)).clamp(min=1e-30)).sum()) / ids.numel()

    def hear(hook: Callable[[Any, Any], None]) -> None:
        handles = [linear.register_forward_pre_hook(hook) for linear in asked]
        try:
            for sequence in ids:
                model(input_ids=sequence[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    hear(first)
    aside = {linear: loudest(each) for linear, each in means.items()}
    hear(second)
    hear(third)
    return {linear: Loudness(means[linear], aside[linear], groups[linear], crests[linear]) for linear in asked}


def loudest(means: torch.Tensor) -> torch.Tensor | None:
    """Returns the places of the loudest inputs, from sizes `[in]`; None if none is loud."""
    loud = (means > LOUD * means.median()).nonzero().flatten()
    found = loud[means[loud].argsort(descending=True)[:MOST]]
    return found if len(found) else None


def steps(groups: torch.Tensor) -> torch.Tensor:
    """Returns the power of two that each group's inputs are divided by, `[groups]`, one for the middle group."""
    middle = groups.median().clamp(min=1e-30)
    return (groups / middle).clamp(2.0**-8, 2.0**8).log2().round().exp2()
