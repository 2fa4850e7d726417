"""The settings of config.json with which a model has the shapes that a cut leaves: found by trying.

Settings that hold an old number are given the new one, alone and together, and the model is built without storage. The
settings are right if every tensor then has the shape that is left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import blocks_of
from lighten.model.empty import Filler, empty_model

MOST = 4
"""Maximum number of settings that change together."""
Shapes = Mapping[str, tuple[int, ...]]


class _Changed(Checkpoint):
    """A checkpoint with other settings."""

    def __init__(self, whole: Checkpoint, changes: dict[str, Any]) -> None:
        super().__init__(whole.path, {**whole.config, **changes})
        self._changes = changes

    @property
    def changes(self) -> dict[str, Any]:
        return self._changes


class Fitting:
    """The shapes that a model's tensors have with one setting or another."""

    def __init__(self, whole: Checkpoint, *, trust_remote_code: bool = False) -> None:
        self.whole, self.trusted = whole, trust_remote_code
        model = self._model({})
        self.config: dict[str, Any] = model.config.get_text_config().to_dict()
        self.own = _shapes(model)
        self.places = Filler(model, whole.weight_map).places

    def _model(self, changes: dict[str, Any]) -> Any:
        """Returns the model with other settings, without storage."""
        source = _Changed(self.whole, changes) if changes else self.whole
        return empty_model(source, torch.bfloat16, trust_remote_code=self.trusted)

    def widths(self, wanted: Shapes, swaps: Mapping[int, int], word: str) -> dict[str, Any] | None:
        """Returns the settings for tensors of other shapes; None if there are none.

        Args:
            wanted: new shapes, by stored name. All other tensors keep theirs.
            swaps: old numbers, and the new ones.
            word: what the names of settings have to contain; "" for all that are no heads and no places.
        """
        target = self._target(wanted)
        subsets = list(_subsets(self._options(swaps, word)))
        fixed: dict[str, Any] = {}
        if word == "head":  # all that tells heads, and their width, which some models derive from their number
            subsets = subsets[::-1]
            fixed = {"head_dim": self.config.get("head_dim") or self.whole.facts.head_dim}
        for chosen in subsets:
            if self.shapes(changes := {**dict(chosen), **fixed}) == target:
                return changes
        return None

    def _target(self, wanted: Shapes) -> dict[str, tuple[int, ...]]:
        return {**self.own, **{self.places[name]: shape for name, shape in wanted.items()}}

    def _options(self, swaps: Mapping[int, int], word: str) -> list[tuple[str, Any]]:
        """Returns the settings that hold an old number, with the new one."""
        found = []
        for name, value in self.config.items():
            apt = word in name if word else not any(part in name for part in ("head", "position", "vocab", "token"))
            changed = _swapped(value, swaps)
            if apt and changed != value:
                found.append((name, changed))
        return found

    def why_no_heads(self, wanted: Shapes, swaps: Mapping[int, int]) -> str:
        """Returns what stands against fewer heads: found by building the model with them."""
        target, options = self._target(wanted), dict(self._options(swaps, "head"))
        if options and self.shapes(dict.fromkeys(options, 1)) == self.own:
            return "its class divides one width among all heads, so that fewer heads would be wider ones"
        found = self.shapes(options) if options else None
        other = next((name for name in target if found and found.get(name) != target[name]), None)
        return f"{other} would change too" if other else "its class has no such shapes"

    def shapes(self, changes: dict[str, Any]) -> Shapes | None:
        """Returns the shapes of all tensors of a model with such settings; None if there is no such model."""
        try:
            return _shapes(self._model(changes))
        except Exception:  # whatever a config or a model says of numbers that do not fit
            return None

    def fewer_layers(self, left: Sequence[int], layers: int) -> dict[str, Any]:
        """Returns the settings of a model of which some layers are left.

        Raises:
            RequestError: its layers would have other shapes, or would work differently.
        """
        count = next((name for name in _COUNTS if self.config.get(name) == layers), None)
        changes: dict[str, Any] = {count: len(left)} if count else {}
        for name, value in self.config.items():
            if isinstance(value, list) and len(value) == layers:
                changes[name] = [value[layer] for layer in left]
            elif name in _PLACES and isinstance(value, list):
                changes[name] = [new for new, old in enumerate(left) if old in value]
            elif name in _FIRST and isinstance(value, int):
                changes[name] = sum(old < value for old in left)
        try:
            new = self._model(changes)
        except Exception as error:
            raise RequestError(f"{self.whole.facts.architecture} cannot have {len(left)} layers ({error})") from error
        old = self._model({})
        before, after = list(blocks_of(old).values()), list(blocks_of(new).values())
        for place, layer in enumerate(left):
            one, other = (_behaviour(each) for each in (before[layer], after[place]))
            if other != one:
                at = next((key for key in one if one[key] != other.get(key)), next(iter(other), ""))
                raise RequestError(
                    f"layer {layer} of {self.whole.facts.architecture} would be another as layer {place}: {at} is "
                    f"{one.get(at)} and would be {other.get(at)}: its config cannot say which layers are left. Let "
                    "other layers go, or channels"
                )
        return changes


_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PLACES = ("moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs")
"""Settings that list the numbers of some layers."""
_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""Settings that say how many layers at the beginning are of a kind."""


def _shapes(model: Any) -> Shapes:
    return {name: tuple(each.shape) for name, each in model.state_dict().items()}


def _swapped(value: Any, swaps: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_swapped(each, swaps) for each in value]
    return swaps.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _subsets(options: list[tuple[str, Any]]) -> Iterator[tuple[tuple[str, Any], ...]]:
    for count in range(1, min(MOST, len(options)) + 1):
        yield from itertools.combinations(options, count)


def _behaviour(block: Any) -> dict[str, Any]:
    """Returns the shapes of a block, and the plain settings of its modules besides the layer's number."""
    found: dict[str, Any] = {name: tuple(each.shape) for name, each in block.named_parameters()}
    for name, module in block.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") or "layer_idx" in key or key in ("layer_id", "config"):
                continue
            if (
                isinstance(value, bool | int | str)
                or value is None
                or (isinstance(value, float) and math.isfinite(value))
            ):
                found[f"{name}.{key}".lstrip(".")] = value
    return found
