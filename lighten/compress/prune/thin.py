"""A checkpoint without some of its channels, heads or layers, read as if it had been written so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lighten.compress.prune.structured import refit
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.anatomy import DOWN, GATE, KEY, LAYERS, OUTPUT, QUERY, UP, VALUE, placed
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import read_layer

Removed = Mapping[int, Sequence[int]]
"""Removed parts by layer: the same number from every layer, so that the model keeps one shape."""


@dataclass(frozen=True)
class Cut:
    """What is removed. Layers have their old numbers."""

    channels: Removed = field(default_factory=dict)
    groups: Removed = field(default_factory=dict)
    """Key/value heads with the query heads that read them."""
    layers: tuple[int, ...] = ()

    def shape(self, config: dict[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Returns the keys of config.json that change.

        Raises:
            RequestError: transformers has no architecture for such a number of heads.
        """
        changes: dict[str, Any] = {}
        if self.channels:
            changes["intermediate_size"] = facts.intermediate - len(next(iter(self.channels.values())))
        if self.groups:
            shared = facts.kv_heads - len(next(iter(self.groups.values())))
            changes["num_key_value_heads"] = shared
            changes["num_attention_heads"] = shared * (facts.heads // facts.kv_heads)
            changes["head_dim"] = facts.head_dim
            if facts.architecture == "LlamaForCausalLM" and facts.hidden % changes["num_attention_heads"]:
                changes |= _as_mistral(config, facts, changes["num_attention_heads"])
        if self.layers:
            left = [layer for layer in range(facts.layers) if layer not in self.layers]
            changes["num_hidden_layers"] = len(left)
            if config.get("layer_types"):
                changes["layer_types"] = [config["layer_types"][layer] for layer in left]
        return changes


def _as_mistral(config: dict[str, Any], facts: ModelFacts, heads: int) -> dict[str, Any]:
    """Returns the changes that make a Llama a Mistral, which computes the same and may have any number of heads."""
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise RequestError(
            f"transformers' Llama needs a hidden size ({facts.hidden}) that is a multiple of its heads, and {heads} "
            "would be left: let another number of key/value heads go"
        )
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


class Thinned(Checkpoint):
    """The checkpoint that is left. With Grams, the linears that lose inputs are repaired."""

    def __init__(
        self, whole: Checkpoint, cut: Cut, grams: Path | None, damp_percent: float, device: str = "cpu"
    ) -> None:
        """Makes the cut. Without `grams` nothing is repaired. The repair is computed on `device`."""
        self._changes = cut.shape(whole.config, whole.facts)
        super().__init__(whole.path, {**whole.config, **self._changes})
        self.whole, self.cut, self.grams, self.damp_percent = whole, cut, grams, damp_percent
        self.device = device
        self.left = [layer for layer in range(whole.facts.layers) if layer not in cut.layers]
        self.unrepaired: list[str] = []
        """Linears whose Gram could not be factorised."""

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that differ from the directory's own config.json."""
        return self._changes

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """File name of the shard of every tensor that is left, layers numbered anew."""
        numbers = {old: new for new, old in enumerate(self.left)}
        found = {}
        for name, file in self.whole.weight_map.items():
            place = placed(name)
            if place is None:
                found[name] = file
            elif place[0] in numbers:
                found[anatomy.layer(numbers[place[0]]) + place[1]] = file
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor."""
        place = placed(name)
        return self.tensors(anatomy.layer(place[0]))[place[1]] if place else self.whole.tensor(name)

    def some(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns tensors by their names. Each layer is cut once."""
        layers = {place[0] for name in names if (place := placed(name))}
        cut = {
            anatomy.layer(at) + rest: each for at in layers for rest, each in self.tensors(anatomy.layer(at)).items()
        }
        return {name: cut[name] if name in cut else self.whole.tensor(name) for name in names}

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns every tensor whose name starts with `prefix`, by the rest of its name."""
        if not prefix.startswith(LAYERS):
            return self.whole.tensors(prefix)
        layer = self.left[int(prefix.removeprefix(LAYERS).partition(".")[0])]
        tensors = self.whole.tensors(anatomy.layer(layer))
        if self.cut.channels:
            kept = _others(self.whole.facts.intermediate, self.cut.channels[layer])
            for name in (GATE, UP):
                _take_outputs(tensors, name, kept)
            self._take_inputs(tensors, layer, DOWN, kept)
        if self.cut.groups:
            facts = self.whole.facts
            groups = _others(facts.kv_heads, self.cut.groups[layer])
            shared = _spread(groups, facts.head_dim)
            own = _spread(groups, facts.head_dim * (facts.heads // facts.kv_heads))
            _take_outputs(tensors, QUERY, own)
            for name in (KEY, VALUE):
                _take_outputs(tensors, name, shared)
            self._take_inputs(tensors, layer, OUTPUT, own)
        return tensors

    def _take_inputs(self, tensors: dict[str, torch.Tensor], layer: int, linear: str, kept: torch.Tensor) -> None:
        name = f"{linear}.weight"
        weight = tensors[name]
        tensors[name] = weight[:, kept].contiguous()
        if self.grams:
            gram = read_layer(self.grams, layer)[0][linear].to(self.device).matrix()
            try:
                found = refit(weight.to(self.device), gram, kept.to(self.device), self.damp_percent)
                tensors[name] = found.to(weight.dtype).cpu()
            except ArithmeticError:
                self.unrepaired.append(anatomy.layer(layer) + linear)


def _others(count: int, gone: Sequence[int]) -> torch.Tensor:
    left = torch.ones(count, dtype=torch.bool)
    left[list(gone)] = False
    return left.nonzero().flatten()


def _spread(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the channels of groups of `size` neighbours."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _take_outputs(tensors: dict[str, torch.Tensor], linear: str, kept: torch.Tensor) -> None:
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in tensors:
            tensors[name] = tensors[name][kept].contiguous()
