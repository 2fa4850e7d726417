"""Experts that go: which ones, and every tensor that has a part for each of them.

The settings with fewer experts are found by trying, as those of fewer channels are. The tensors whose shapes then
differ are those that have a part for every expert: the stacks of matrices, their biases, the router and what it adds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lighten.compress.prune.fitting import Fitting
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy, Linear
from lighten.model.grams import read_layer

CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts", "num_experts_per_token", "moe_topk")
"""Settings that say how many experts a token gets."""
GROUPS = ("n_group", "num_expert_groups")
"""Settings that say in how many groups experts are chosen from."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Experts:
    """The experts of a model."""

    of_layers: dict[int, int]
    """Number of experts of each layer that has any."""
    last: dict[int, dict[int, Linear]]
    """By layer and expert: the matrix that gives what the expert gives."""

    @staticmethod
    def of(anatomy: Anatomy) -> Experts:
        """Finds the experts in the anatomy of a model."""
        last: dict[int, dict[int, Linear]] = {}
        for index, layer in enumerate(anatomy.layers):
            for linear in layer.linears:
                if linear.inside is not None and linear.inside.expert is not None and "down" in linear.inside.tensor:
                    last.setdefault(index, {})[linear.inside.expert] = linear
        return Experts({index: len(each) for index, each in last.items()}, last)

    def order(self, layer: int, checkpoint: Checkpoint, prefix: str, grams: Path, device: str) -> list[int]:
        """Returns the experts of a layer, those that give least first.

        What an expert gives is the sum of the squares of its outputs over the tokens that the router sent to it,
        tr(W H Wᵀ): how often it is chosen, and how much it then says.
        """
        found, read_by = read_layer(grams, layer, device)
        tensors = checkpoint.tensors(prefix)
        energy = {}
        for expert, linear in self.last[layer].items():
            weight = linear.matrix(tensors).to(device).float()
            gram = found[read_by[linear.name]].matrix()
            energy[expert] = float(((weight @ gram) * weight).sum())
        return sorted(energy, key=energy.__getitem__)


@dataclass(frozen=True)
class Thinner:
    """The settings of a model with fewer experts, and the stored tensors that lose parts."""

    settings: dict[str, Any]
    stacked: frozenset[str]
    """Stored tensors with a part for each expert, along the first dimension."""
    single: frozenset[str]
    """Stored tensors of one expert, whose number is in their name."""

    def renamed(self, name: str, gone: Sequence[int], first: int) -> str | None:
        """Returns the new name of a stored tensor of an expert; None if the expert goes.

        Args:
            name: the whole name.
            gone: experts that go from its layer.
            first: letters before the expert's number, those of the layer.
        """
        found = NUMBER.search(name, first)
        if name not in self.single or found is None:
            return name
        number = int(found[0])
        if number in gone:
            return None
        return f"{name[: found.start()]}{number - sum(each < number for each in gone)}{name[found.end() :]}"

    @staticmethod
    def of(fitting: Fitting, whole: Checkpoint, experts: Experts, count: int) -> Thinner:
        """Finds them for `count` experts less in every layer.

        Raises:
            RequestError: no setting gives the model fewer experts, or a token would get more than are left.
        """
        numbers = set(experts.of_layers.values())
        name = whole.facts.architecture
        if len(numbers) != 1:
            raise RequestError(
                f"{name} has {' and '.join(map(str, sorted(numbers)))} experts in its layers: none can go"
            )
        (total,) = numbers
        left = total - count
        _check(fitting.config, name, left)
        for setting, value in fitting.config.items():
            if "expert" not in setting or value != total or isinstance(value, bool):
                continue
            shapes = fitting.shapes({setting: left})
            changed = _changed(fitting.own, shapes, total, left) if shapes else None
            if changed:
                return Thinner({setting: left}, *_stored(fitting, whole, changed, total))
        raise RequestError(
            f"no setting of {name} gives it {left} experts instead of {total} and leaves the rest as it is"
        )


def _check(config: Mapping[str, Any], name: str, left: int) -> None:
    """Raises RequestError if a token gets more experts than would be left, or they are chosen from groups."""
    for setting in CHOSEN:
        if isinstance(chosen := config.get(setting), int) and chosen > left:
            raise RequestError(
                f"{left} experts would be left, and a token gets {chosen} of them ({setting}): let fewer go"
            )
    for setting in GROUPS:
        if isinstance(groups := config.get(setting), int) and groups > 1:
            raise RequestError(
                f"the router of {name} chooses among {groups} groups of experts ({setting}): none can go"
            )


def _changed(before: Any, after: Any, total: int, left: int) -> set[str] | None:
    """Returns the model's tensors that lose parts along their first dimension; None if others change too."""
    if before.keys() != after.keys():
        return None
    found = {name for name in before if before[name] != after[name]}
    if not found or any(before[name] != (total, *after[name][1:]) or after[name][0] != left for name in found):
        return None
    return found


def _stored(
    fitting: Fitting, whole: Checkpoint, changed: set[str], total: int
) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the stored tensors with a part for each expert, and those of one expert."""
    shapes = whole.shapes()
    by_place: dict[str, list[str]] = {}
    for name, place in fitting.places.items():
        if place in changed:
            by_place.setdefault(place, []).append(name)
    stacked, single = set(), set()
    for names in by_place.values():
        if len(names) % total == 0:
            single.update(names)
        elif all(shapes[name][0] == total for name in names):
            stacked.update(names)
        else:
            raise RequestError(f"{names[0]} is stored in a form in which its experts are not apart: none can go")
    return frozenset(stacked), frozenset(single)


def without(tensor: torch.Tensor, gone: Sequence[int]) -> torch.Tensor:
    """Returns a stack without the parts of some experts."""
    stays = torch.ones(len(tensor), dtype=torch.bool)
    stays[list(gone)] = False
    return tensor[stays].contiguous()
