"""A model of transformers with fewer or more layers, made from its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from lighten.errors import RequestError
from lighten.model.discovery import blocks_of

COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers", "n_layers")
"""Settings that count layers. A family has those of its own."""


def kept_layers(count: int, wanted: int) -> list[int]:
    """Returns the layers of `count` that a model of `wanted` layers keeps: evenly spread, with first and last."""
    return [round(place * (count - 1) / max(1, wanted - 1)) for place in range(wanted)]


def with_layers(model: Any, wanted: int) -> Any:
    """Returns a copy of a model with `wanted` layers in its encoder and as many in its decoder.

    Raises:
        RequestError: it has fewer, or its config does not count them by a name that is known.
    """
    for numbers in _stacks(model).values():
        if wanted > len(numbers):
            raise RequestError(f"{type(model).__name__} has {len(numbers)} layers: it cannot be given {wanted}")
    return _made(model, wanted, lambda count: kept_layers(count, wanted))


def repeated(model: Any, wanted: int) -> Any:
    """Returns a copy of a model with `wanted` layers in each stack, in which its own layers are repeated in place."""
    return _made(model, wanted, lambda count: [place * count // wanted for place in range(wanted)])


def _stacks(model: Any) -> dict[str, list[int]]:
    """Returns the numbers of the layers of each list of layers, by its name."""
    found: dict[str, list[int]] = {}
    for name in blocks_of(model):
        stack, _, number = name.rpartition(".")
        found.setdefault(stack, []).append(int(number))
    return found


def _made(model: Any, wanted: int, sources: Callable[[int], list[int]]) -> Any:
    """Returns a model whose layers are copies of those that `sources` names, by the number of layers of a stack."""
    stacks = _stacks(model)
    config = copy.deepcopy(model.config)
    counts = {len(numbers) for numbers in stacks.values()}
    names = [name for name in COUNTS if getattr(config, name, None) in counts]
    if not names:
        raise RequestError(f"the config of {type(model).__name__} does not say how many layers it has")
    for name in names:
        setattr(config, name, wanted)
    made = type(model)(config)
    layer = re.compile("|".join(rf"({re.escape(stack)})\.(\d+)\." for stack in stacks))
    old, state = model.state_dict(), {}
    for name in made.state_dict():
        if found := layer.match(name):
            stack, number = (each for each in found.groups() if each is not None)
            source = sources(len(stacks[stack]))[int(number)]
            state[name] = old[f"{stack}.{source}.{name.removeprefix(found[0])}"]
        else:
            state[name] = old[name]
    made.load_state_dict(state)
    return made.to(model.device, model.dtype)
