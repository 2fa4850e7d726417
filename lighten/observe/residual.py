"""What a block adds the outputs of its linears to: the states that it is called with, found by watching one batch.

A block of most models returns its input plus the outputs of two or more of its modules. Nothing says so but the
numbers, and blocks that normalise an output before it is added do something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SMALL = 0.02
"""A module whose output counts for less of what a block adds is none of those that it adds."""
ONE = 2**-8
"""A factor that differs from one by less is one, as far as bfloat16 can tell."""
ROUNDED = 2**-6
"""Largest share of the numbers that meet in a sum by which the sum may differ, for it was rounded more than once."""
OFF = 0.01
"""Largest share of the sums that may differ by more."""


def states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns the states that a block is called with, `[batch, length, hidden]`; None if it gets none."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, torch.Tensor) else None


def given_back(answer: Any) -> torch.Tensor | None:
    """Returns the states among what a module gives back."""
    first = answer[0] if isinstance(answer, tuple | list) and answer else answer
    return first if isinstance(first, torch.Tensor) else None


def added(
    run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Returns the modules whose outputs a block adds to its states, with the factor of each, in the order of calls.

    Args:
        run: the block's forward.
        args: arguments of a call.
        kwargs: the same.
        modules: modules of the block that may be among them, by name.

    Returns:
        Nothing if the block does more than add, writes into its states, or calls a module twice.
    """
    outputs: dict[str, torch.Tensor | None] = {}

    def keep(name: str, answer: Any) -> None:
        outputs[name] = None if name in outputs else given_back(answer)

    hooks = [
        module.register_forward_hook(lambda _, __, answer, name=name: keep(name, answer))
        for name, module in modules.items()
    ]
    try:
        answer = given_back(run(*args, **kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    states = states_of(args, kwargs)
    if answer is None or states is None or answer.shape != states.shape:
        return {}
    found = {name: each for name, each in outputs.items() if each is not None and each.numel() == states.numel()}
    for _ in range(2):  # without those that are not added, once more
        if not found:
            return {}
        flat = torch.stack([each.flatten().float() for each in found.values()])
        gram = (flat @ flat.t()).double()
        gram.diagonal().mul_(1 + 1e-9)
        factors = torch.linalg.solve(gram, (flat @ (answer - states).flatten().float()).double())
        shares = (factors * gram.diagonal().sqrt()).abs()
        found = {name: found[name] for name, share in zip(found, shares, strict=True) if share > SMALL * shares.max()}
        if len(found) == len(factors):
            break
    told = {name: 1.0 if abs(each - 1) < ONE else each for name, each in zip(found, factors.tolist(), strict=True)}
    return told if adds_up(states, [found[name] * factor for name, factor in told.items()], answer) else {}


def adds_up(states: torch.Tensor, parts: list[torch.Tensor], answer: torch.Tensor) -> bool:
    """Returns whether states and parts make the answer, but for rounding."""
    whole, size = states.float(), states.float().abs()
    for part in parts:
        whole = whole + part.reshape(states.shape).float()
        size = torch.maximum(size, part.reshape(states.shape).float().abs())
    wrong = (whole - answer.float()).abs() > ROUNDED * size
    return float(wrong.float().mean()) <= OFF
