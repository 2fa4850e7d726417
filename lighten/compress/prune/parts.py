"""What can go from a model, layer by layer, and the settings of the model that is left."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lighten.compress.prune.experts import Experts, Thinner
from lighten.compress.prune.fitting import Fitting
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model import anatomy as llama
from lighten.model.architectures import ARCHITECTURES
from lighten.model.blockwise import known_anatomy
from lighten.model.channels import Channels, Prunable, of_llama, prunable_of
from lighten.model.checkpoint import Checkpoint

Removed = Mapping[int, Sequence[int]]
"""Removed parts by layer: the same number from every layer, so that the model keeps one shape."""


@dataclass(frozen=True)
class Cut:
    """What is removed. Layers have their old numbers."""

    channels: Removed = field(default_factory=dict)
    groups: Removed = field(default_factory=dict)
    """Key/value heads with the query heads that read them."""
    layers: tuple[int, ...] = ()
    experts: Removed = field(default_factory=dict)


class Parts:
    """The layers of a model, what can go from each of them, and the settings of a model that has less of it."""

    def __init__(self, whole: Checkpoint, grams: Path | None = None, *, trust_remote_code: bool = False) -> None:
        """Finds the layers. `grams` is the directory of the sweep over the model, which tells them too."""
        self.whole, self.trusted = whole, trust_remote_code
        self.known = whole.facts.architecture in ARCHITECTURES
        self._anatomy = None if self.known else known_anatomy(whole, grams, trust_remote_code=trust_remote_code)
        layers = self._anatomy.layers if self._anatomy else []
        self.prefixes = [layer.prefix for layer in layers] or [llama.layer(i) for i in range(whole.facts.layers)]
        self._thinners: dict[int, Thinner] = {}
        self._settings: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    @cached_property
    def prunable(self) -> list[Prunable]:
        """What can go from each layer."""
        if self._anatomy is None:
            return [of_llama(self.whole.facts)] * len(self.prefixes)
        return prunable_of(self.whole, self._anatomy, trust_remote_code=self.trusted)

    @cached_property
    def fitting(self) -> Fitting:
        """The shapes of the model with other settings."""
        return Fitting(self.whole, trust_remote_code=self.trusted)

    @cached_property
    def experts(self) -> Experts:
        """The experts of the layers.

        Raises:
            RequestError: there are none that methods take.
        """
        found = Experts.of(self._anatomy) if self._anatomy else None
        if found is None or not found.of_layers:
            raise RequestError(f"{self.whole.facts.architecture} has no experts that lighten takes apart: none can go")
        return found

    def thinner(self, cut: Cut) -> Thinner:
        """Returns what a cut of experts does to the tensors, and the settings that it needs."""
        count = len(next(iter(cut.experts.values())))
        if count not in self._thinners:
            self._thinners[count] = Thinner.of(self.fitting, self.whole, self.experts, count)
        return self._thinners[count]

    def placed(self, name: str) -> tuple[int, str] | None:
        """Returns the layer of a tensor and its name in the layer; None outside of layers."""
        for end in (found.end() for found in re.finditer(r"\.", name)):
            if (layer := self._numbers.get(name[:end])) is not None:
                return layer, name[end:]
        return None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {prefix: number for number, prefix in enumerate(self.prefixes)}

    def cuts(self, cut: Cut, layer: int) -> list[tuple[Channels, Sequence[int]]]:
        """Returns what goes from a layer that stays."""
        found = []
        for channels, gone in (
            (self.prunable[layer].mlp, cut.channels.get(layer)),
            (self.prunable[layer].heads, cut.groups.get(layer)),
        ):
            if channels and gone:
                found.append((channels, gone))
        return found

    def params(self, cut: Cut) -> int:
        """Returns the number of weights that a cut leaves."""
        changed = self.shapes(cut)
        gone = {self.prefixes[layer] for layer in cut.layers}
        return sum(
            math.prod(changed.get(name, shape))
            for name, shape in self._whole_shapes.items()
            if not ((place := self.placed(name)) and self.prefixes[place[0]] in gone)
        )

    def mlps(self, amount: Callable[[int], int]) -> tuple[dict[int, int], dict[str, str]]:
        """Returns how many channels go from the MLP of each layer, and why the others stay, by name.

        Args:
            amount: number of channels that go from an MLP of a width.

        Raises:
            RequestError: no MLP can have fewer channels.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        kept: dict[str, str] = {}
        for layer, each in enumerate(self.prunable):
            if each.mlp:
                groups.setdefault((each.mlp.reader, each.mlp.groups), []).append(layer)
            else:
                kept[self.prefixes[layer][:-1]] = each.reason
        counts = {layer: amount(width) for (_, width), layers in groups.items() for layer in layers}
        if self.known:
            return counts, {}
        for (reader, width), layers in list(groups.items()):
            if not 0 < amount(width) < width:
                kept |= {
                    f"{self.prefixes[i]}{reader}": f"of {width} channels none can go so that some stay" for i in layers
                }
                del groups[reader, width]
        best: list[int] = []
        why = ""
        for chosen in (pick for size in range(len(groups), 0, -1) for pick in itertools.combinations(groups, size)):
            layers = sorted(layer for each in chosen for layer in groups[each])
            try:
                self.widths({layer: range(counts[layer]) for layer in layers})
            except RequestError as error:
                why = str(error)
                continue
            best = layers
            break
        for (reader, _), layers in groups.items():
            kept |= {f"{self.prefixes[i]}{reader}": why for i in layers if i not in best}
        if not best:
            reason = why or next(iter(kept.values()), "it has no layers")
            raise RequestError(f"no channels of MLPs can go from {self.whole.facts.architecture}: {reason}")
        return {layer: counts[layer] for layer in best}, kept

    def attentions(self, amount: Callable[[int], int]) -> dict[int, int]:
        """Returns how many groups of heads go from each layer that has any.

        Raises:
            RequestError: there is none.
        """
        found = {i: amount(each.heads.groups) for i, each in enumerate(self.prunable) if each.heads}
        if not found:
            raise RequestError(
                f"no heads can go from {self.whole.facts.architecture}: no layer has queries, keys and values that "
                "serve only the inputs of one linear (heads that layers share, sinks, norms over all heads)"
            )
        return found

    @cached_property
    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.whole.shapes()

    def shapes(self, cut: Cut) -> dict[str, tuple[int, ...]]:
        """Returns the new shapes of tensors that lose channels or heads, by their names in the whole checkpoint."""
        found: dict[str, tuple[int, ...]] = {}

        def lose(name: str, outputs: int, inputs: int) -> None:
            if name in self._whole_shapes:
                rows, *columns = found.get(name, self._whole_shapes[name])
                found[name] = (rows - outputs, *(column - inputs for column in columns))

        for layer, gone in cut.experts.items():
            for name in self.thinner(cut).stacked:
                if name.startswith(self.prefixes[layer]):
                    total, *others = self._whole_shapes[name]
                    found[name] = (total - len(gone), *others)
        for layer in {*cut.channels, *cut.groups} - {*cut.layers}:
            prefix = self.prefixes[layer]
            for channels, gone in self.cuts(cut, layer):
                lose(f"{prefix}{channels.reader}.weight", 0, len(gone) * channels.size)
                for rows in channels.rows:
                    lose(f"{prefix}{rows.linear}.weight", len(gone) * rows.size, 0)
                    lose(f"{prefix}{rows.linear}.bias", len(gone) * rows.size, 0)
        return found

    def settings(self, cut: Cut) -> dict[str, Any]:
        """Returns the keys of config.json that change.

        Raises:
            RequestError: no setting gives the model such shapes.
        """
        if cut.experts:
            return self.thinner(cut).settings
        if self.known:
            return _of_llama(cut, self.whole.config, self.whole.facts)
        key = str([sorted((i, len(gone)) for i, gone in each.items()) for each in (cut.channels, cut.groups)])
        if (key, cut.layers) not in self._settings:
            self._settings[key, cut.layers] = self._found(cut)
        return self._settings[key, cut.layers]

    def _found(self, cut: Cut) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if cut.channels:
            changes |= self.widths(cut.channels)
        if cut.groups:
            changes |= self.heads(cut.groups)
        if cut.layers:
            left = [layer for layer in range(len(self.prefixes)) if layer not in cut.layers]
            fewer = self.fitting.fewer_layers(left, len(self.prefixes))
            lists = {name: [changes[name][i] for i in left] for name in changes if isinstance(changes[name], list)}
            changes = {**fewer, **changes, **lists}
        return changes

    def widths(self, channels: Removed) -> dict[str, Any]:
        """Returns the settings for fewer channels of MLPs.

        Raises:
            RequestError: there are none.
        """
        swaps = {}
        for layer, gone in channels.items():
            mlp = self.prunable[layer].mlp
            assert mlp
            swaps[mlp.groups] = mlp.groups - len(gone)
        found = self.fitting.widths(self.shapes(Cut(channels)), swaps, "")
        if found is None:
            width = " and ".join(map(str, swaps))
            raise RequestError(
                f"no setting of {self.whole.facts.architecture} gives these MLPs another width than {width} and leaves "
                "the rest as it is"
            )
        return found

    def heads(self, groups: Removed) -> dict[str, Any]:
        """Returns the settings for fewer groups of heads.

        Raises:
            RequestError: there are none.
        """
        swaps = {}
        for layer, gone in groups.items():
            heads = self.prunable[layer].heads
            assert heads
            for count in {self.whole.facts.heads, self.whole.facts.kv_heads, heads.groups}:
                if count % heads.groups == 0:
                    swaps[count] = count // heads.groups * (heads.groups - len(gone))
        wanted = self.shapes(Cut({}, groups))
        found = self.fitting.widths(wanted, swaps, "head")
        if found is None:
            raise RequestError(
                f"no setting of {self.whole.facts.architecture} gives it fewer heads in these layers and leaves the "
                f"rest as it is ({self.fitting.why_no_heads(wanted, swaps)}): let channels or layers go"
            )
        return found


def _of_llama(cut: Cut, config: dict[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """Returns the keys of config.json that change in models whose settings are known.

    Raises:
        RequestError: transformers has no architecture for such a number of heads.
    """
    changes: dict[str, Any] = {}
    if cut.channels:
        changes["intermediate_size"] = facts.intermediate - len(next(iter(cut.channels.values())))
    if cut.groups:
        shared = facts.kv_heads - len(next(iter(cut.groups.values())))
        changes["num_key_value_heads"] = shared
        changes["num_attention_heads"] = shared * (facts.heads // facts.kv_heads)
        changes["head_dim"] = facts.head_dim
        if facts.architecture == "LlamaForCausalLM" and facts.hidden % changes["num_attention_heads"]:
            changes |= _as_mistral(config, facts, changes["num_attention_heads"])
    if cut.layers:
        left = [layer for layer in range(facts.layers) if layer not in cut.layers]
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
