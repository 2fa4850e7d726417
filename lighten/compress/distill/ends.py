"""The parts of a causal language model of any family that a distillation needs: body, head, and the code behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lighten.errors import RequestError
from lighten.model.architectures import ARCHITECTURES
from lighten.model.checkpoint import Checkpoint

Behind = Callable[[torch.Tensor], torch.Tensor]
"""What a model's own code makes of the outputs of its head `[positions, vocab]`: soft caps, scales."""


def head_of(model: Any) -> nn.Linear:
    """Returns the output head.

    Raises:
        RequestError: it is no linear.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RequestError(f"{type(model).__name__} has no head that is a linear: it cannot teach or learn here")
    return head


def run_body(model: Any, ids: torch.Tensor, *, states: bool = False) -> Any:
    """Runs a model without its head. `states` are kept of all layers."""
    return model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=states)


class _Given:
    """Outputs of a body that did not run."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, _: int) -> torch.Tensor:
        return self.last_hidden_state


def behind_of(model: Any) -> Behind | None:
    """Returns the code behind a model's head; None if it hands the logits on as they are.

    The model's own forward is run, with a body that does nothing and a head that gives what is asked.
    """
    body, head = model.get_decoder(), head_of(model)

    def behind(given: torch.Tensor) -> torch.Tensor:
        try:
            nothing = torch.zeros(1, 1, head.in_features, device=given.device)
            body.__dict__["forward"] = lambda *_, **__: _Given(nothing)
            head.__dict__["forward"] = lambda *_, **__: given[None]
            found: torch.Tensor = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=given.device)).logits[0]
        finally:
            body.__dict__.pop("forward", None)
            head.__dict__.pop("forward", None)
        return found

    probe = torch.linspace(-50.0, 50.0, 7, device=head.weight.device)[None]
    return None if torch.equal(behind(probe), probe) else behind


def changes_of(step: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the keys of config.json that a student in a shape of its own changes, lists of layers among them."""
    changes: dict[str, Any] = step.changes(checkpoint.facts)
    layers, left = checkpoint.facts.layers, changes.get("num_hidden_layers")
    if left is None or checkpoint.facts.architecture in ARCHITECTURES:
        return changes
    kept = [-(-(place + 1) * layers // left) - 1 for place in range(left)] if left <= layers else None
    for name, value in checkpoint.config.items():
        if isinstance(value, list) and len(value) == layers:
            if kept is None:
                raise RequestError(
                    f"{checkpoint.facts.architecture} lists its {layers} layers ({name}): a student has fewer, not more"
                )
            changes[name] = [value[layer] for layer in kept]
    return changes
