"""Grams of the inputs of experts, one expert at a time.

An expert sees only the tokens that the router sends to it. The calls of a layer's experts are kept, and each expert's
inputs are gathered from them when its turn comes, so that the Grams of one expert are in memory at a time. An expert
that saw fewer tokens than its inputs are wide has a Gram of too low a rank: it is drawn towards that of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lighten.model.discovery import Layer, Linear
from lighten.model.experts import LAST, given_to, inner, routed
from lighten.model.grams import Gram
from lighten.observe.gram import accumulate

FORCED = 2
"""Number of tokens for each channel that an expert with too few of its own is made to see."""


@dataclass
class Expert:
    """One expert of a layer."""

    number: int
    first: list[Linear] = field(default_factory=list)
    """Linears that read what the router sends."""
    last: list[Linear] = field(default_factory=list)
    """Linears that read what those give."""


class ExpertInputs:
    """The inputs of all experts of one module."""

    def __init__(self, name: str, module: nn.Module, experts: list[Expert], device: str) -> None:
        self.name, self.module, self.experts, self.device = name, module, experts, device
        self._calls: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def hook(self) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        """Returns a forward pre-hook that keeps the states of a call, and which expert gets which."""
        return lambda module, args, kwargs: self._calls.extend(routed(module, args, kwargs))

    def grams(self) -> Iterator[tuple[Expert, int, dict[str, Gram]]]:
        """Yields each expert, the number of its tokens, and the Grams of its inputs by the name of the first reader."""
        spread = Spread(self._calls)
        for expert in self.experts:
            parts = [given_to(expert.number, *call) for call in self._calls]
            tokens = sum(map(len, parts))
            found: dict[str, Gram] = {}
            for readers, of in ((expert.first, self._same), (expert.last, self._made)):
                if not readers:
                    continue
                width = readers[0].shape[1]
                gram = Gram.empty(width, self.device)
                for part in parts:
                    if len(part):
                        accumulate(gram, of(expert, part))
                if tokens < width:
                    other = Gram.empty(width, self.device)
                    accumulate(other, of(expert, spread.of(width)))
                    draw(gram, other)
                found[readers[0].name] = gram
            yield expert, tokens, found

    @staticmethod
    def _same(_: Expert, states: torch.Tensor) -> torch.Tensor:
        return states

    def _made(self, expert: Expert, states: torch.Tensor) -> torch.Tensor:
        return inner(self.module, expert.number, states)


class Spread:
    """States that are evenly spread over the tokens of calls of a module of experts."""

    def __init__(self, calls: list[tuple[torch.Tensor, Any]]) -> None:
        """`calls` are states, and which of them each expert gets, as `routed` returns them."""
        self._calls = calls
        self._found: dict[int, torch.Tensor] = {}

    def of(self, width: int) -> torch.Tensor:
        """Returns enough of them, `[tokens, in]`, for a Gram of what an expert makes of them, which is so wide."""
        if width not in self._found:
            parts = []
            for states, chosen in self._calls:
                every = states if chosen is not None else states.flatten(0, 1)
                parts.append(every if chosen is not None else every[every.abs().sum(-1) > 0])
            found = torch.cat(parts)
            step = max(1, len(found) // (FORCED * max(width, found.shape[-1])))
            self._found[width] = found[::step].clone()
        return self._found[width]


def draw(gram: Gram, other: Gram) -> None:
    """Draws the Gram of few tokens towards another: the more, the fewer its tokens are for its width.

    The share of the other is 1 - tokens / width; both count as sums over the same number of tokens, at least one.
    """
    share = 1 - gram.tokens / gram.width
    tokens = max(gram.tokens, 1)
    gram.blocks.mul_(1 - share).add_(other.blocks, alpha=share * tokens / max(other.tokens, 1))
    torch.maximum(gram.absmax, other.absmax, out=gram.absmax)
    gram.tokens = tokens


def experts_of(layer: Layer, block: nn.Module, device: str) -> list[ExpertInputs]:
    """Returns the modules of experts of a layer, ready to watch."""
    by_module: dict[str, dict[int, Expert]] = {}
    for linear in layer.linears:
        if linear.inside is not None and linear.inside.expert is not None:
            experts = by_module.setdefault(linear.module, {})
            expert = experts.setdefault(linear.inside.expert, Expert(linear.inside.expert))
            (expert.last if linear.inside.tensor == LAST else expert.first).append(linear)
    return [
        ExpertInputs(name, block.get_submodule(name), [experts[number] for number in sorted(experts)], device)
        for name, experts in by_module.items()
    ]
