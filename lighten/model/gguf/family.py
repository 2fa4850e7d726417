"""A family of models for llama.cpp: its tensors and keys, and where they come from and go to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.turns import PLUS_ONE, SAME, Model, Turn, after

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

EXPERT = "{e}"
"""Stands for the number of an expert in the name of a stored tensor. The file has all experts in one tensor."""
_NUMBER = re.compile(r"\.(\d+)\.")


Config = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """One stored tensor of a layer (or around the layers), or one of each expert, and its names in a file."""

    stored: str
    names: tuple[str, ...]
    """Names in a file. Several, if the file has the tensor in parts."""
    turn: Turn = SAME
    needed: bool = True
    group: str = ""
    """A rule is needed in a layer that has another tensor of its group. Without a group it is always needed."""
    rounded: bool = True
    """Whether a matrix gets the type of the file. Otherwise it is F32, as llama.cpp wants it."""
    when: Callable[[Config], bool] | None = None
    """Whether the rule holds for a config. None holds always."""


Rules = tuple[Rule, ...]
FLOATS = (
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "expert_weights_scale",
    "final_logit_softcapping",
)
"""Keys of `pairs` whose values are floats, whatever config.json has."""


def part(
    modules: Mapping[str, str],
    biases: Iterable[str] = (),
    turns: Mapping[str, Turn] | None = None,
    group: str = "",
) -> Rules:
    """Returns the rules of modules with a weight.

    Args:
        modules: name in a file of every module of a layer, in the order of the file.
        biases: modules that may have a bias.
        turns: how weights and biases of a module are turned.
        group: of the rules.
    """
    rules = []
    for module, name in modules.items():
        turn = (turns or {}).get(module, SAME)
        rules.append(Rule(f"{module}.weight", (f"{name}.weight",), turn, group=group))
        if module in biases:
            rules.append(Rule(f"{module}.bias", (f"{name}.bias",), turn, needed=False, group=group))
    return tuple(rules)


def less_one(rules: Rules, *exceptions: str) -> Rules:
    """Returns rules whose norms are stored less one. llama.cpp wants them whole."""

    def changed(rule: Rule) -> Rule:
        module = rule.stored.removesuffix(".weight")
        if not module.endswith("norm") or module in exceptions:
            return rule
        return replace(rule, turn=after(PLUS_ONE, rule.turn))

    return tuple(changed(rule) for rule in rules)


AROUND = (
    Rule(anatomy.EMBEDDING_WEIGHT, ("token_embd.weight",)),
    Rule(anatomy.NORM_WEIGHT, ("output_norm.weight",)),
    Rule(anatomy.HEAD_WEIGHT, ("output.weight",), needed=False),
)
"""Tensors around the layers."""


def nothing(config: Config, facts: ModelFacts) -> Mapping[str, Any]:
    """Returns no further keys."""
    return {}


def no_config(header: Header) -> Config:
    """Returns no further settings."""
    return {}


def no_objection(config: Config, facts: ModelFacts) -> str | None:
    """Returns None: llama.cpp runs any such model."""
    return None


def head_dim(config: Config, facts: ModelFacts) -> int:
    """Returns the width of a head."""
    return facts.head_dim


def any_file(header: Header) -> bool:
    """Returns True: all files of the architecture are of this family."""
    return True


@dataclass(frozen=True)
class Family:
    """The facts of one architecture for llama.cpp."""

    arch: str
    """Name in llama.cpp."""
    architecture: str
    """Name of the class in transformers."""
    model_type: str
    """Name of the type in transformers."""
    layer: Rules
    """Tensors of a layer."""
    around: Rules = AROUND
    """Tensors around the layers: the embedding, others, the norm and the head."""
    layers: str = anatomy.LAYERS
    """Beginning of the stored names of a layer's tensors, before its number."""
    left_out: str = ""
    """Pattern of stored names that llama.cpp has no use for, such as parts for other tasks. They are named."""
    activation: str = "silu"
    head: Literal["any", "tied", "own"] = "any"
    """Form of the head: "any" may be the embedding, "tied" must be, "own" is a tensor even if it is the embedding."""
    scalings: tuple[str, ...] = ("linear", "yarn")
    """Scalings of positions that are allowed."""
    yarn: Mapping[str, str] | None = None
    """Settings of YaRN that may differ from the usual, and their keys. Without a key llama.cpp does not read them."""
    partial: bool = False
    """Whether a part of each head may be rotated."""
    rotates: Callable[[Config, ModelFacts], int] = head_dim
    """Width of the heads that `rope_parameters` rotate."""
    windows: bool = False
    """Whether `keys` says which layers have a sliding window. Otherwise llama.cpp has none."""
    varied: bool = False
    """Whether sizes may differ from layer to layer."""
    experts: bool = False
    """Whether layers may have experts."""
    defaults: Mapping[str, Any] | None = None
    """What config.json leaves out when it is the default of transformers, where that is not what most have."""
    pairs: Mapping[str, str] | None = None
    """Settings of config.json that are keys of a file as they are: their name by key."""
    keys: Callable[[Config, ModelFacts], Mapping[str, Any]] = nothing
    """Further metadata, by key without the architecture's name. None leaves out a common key."""
    config: Callable[[Header], Config] = no_config
    """Settings that `keys` turned into metadata, from a file."""
    objection: Callable[[Config, ModelFacts], str | None] = no_objection
    """Reason why llama.cpp cannot run this config, or None."""
    when: Callable[[Config], bool] | None = None
    """Whether the row holds for a config; if it does not, `other` does. None holds always."""
    other: Family | None = None
    """Row of the other models of the same class."""
    reads: Callable[[Header], bool] = any_file
    """Whether a file of `arch` is of this family, where several have that name."""

    @property
    def plain(self) -> bool:
        """Whether the sizes in config.json give the shapes of all linears."""
        return not (self.varied or self.experts)

    @property
    def embedding(self) -> str:
        """Stored name of the embedding."""
        return next(rule.stored for rule in self.around if rule.names == ("token_embd.weight",))

    @property
    def head_weight(self) -> str:
        """Stored name of the head."""
        return next((rule.stored for rule in self.around if rule.names == ("output.weight",)), anatomy.HEAD_WEIGHT)


@dataclass(frozen=True)
class Place:
    """A rule in one layer, or around the layers."""

    rule: Rule
    stored: str
    """Stored name, with EXPERT in place of an expert's number."""
    names: tuple[str, ...]
    """Names in a file."""
    layer: int | None = None

    @property
    def of_experts(self) -> bool:
        """Whether it is stored once for every expert."""
        return EXPERT in self.stored

    def parts(self, experts: int) -> list[str]:
        """Returns the stored names of the tensors that make up a file's tensor."""
        if not self.of_experts:
            return [self.stored]
        return [self.stored.replace(EXPERT, str(number)) for number in range(experts)]

    def label(self, index: int) -> str:
        """Returns a name for one of a file's tensors, after the stored one."""
        stored = self.stored.replace(f".{EXPERT}", "")
        return stored if len(self.names) == 1 else f"{stored}[{self.names[index].split('.')[-2]}]"


def places(family: Family, model: Model) -> Iterator[Place]:
    """Yields all places that a model may have, in the order of the file."""
    rules = [rule for rule in family.layer if rule.when is None or rule.when(model.config)]
    around = [rule for rule in family.around if family.head != "tied" or rule.names != ("output.weight",)]
    first = [rule for rule in around if rule.names[0] not in ("output_norm.weight", "output.weight")]
    yield from (Place(rule, rule.stored, rule.names) for rule in first)
    for layer in range(model.facts.layers):
        for rule in rules:
            names = tuple(f"blk.{layer}.{name}" for name in rule.names)
            yield Place(rule, f"{family.layers}{layer}.{rule.stored}", names, layer)
    yield from (Place(rule, rule.stored, rule.names) for rule in around if rule not in first)


def missing(known: Iterable[Place], found: Iterable[Place]) -> Place | None:
    """Returns a place that should be among those that were found; None if all are there, in one form or another."""
    there = list(found)
    taken = {name for place in there for name in place.names} | {place.stored for place in there}
    groups = {(place.layer, place.rule.group) for place in there if place.rule.group}
    for place in known:
        wanted = not place.rule.group or (place.layer, place.rule.group) in groups
        if place.rule.needed and wanted and not taken.intersection((*place.names, place.stored)):
            return place
    return None


def place_of(known: Mapping[str, Place], stored: str) -> tuple[Place, int | None] | None:
    """Returns the place of a stored tensor and the number of its expert; None if it has no place.

    Args:
        known: places by stored name, with EXPERT in place of an expert's number.
        stored: name of the tensor.
    """
    if stored in known:
        return known[stored], None
    for found in _NUMBER.finditer(stored):
        general = f"{stored[: found.start()]}.{EXPERT}.{stored[found.end() :]}"
        if general in known:
            return known[general], int(found[1])
    return None


def expert_count(config: Config) -> int:
    """Returns the number of routed experts of a layer; 0 if there are none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(config[name]) for name in names if config.get(name)), 0)


__all__ = ["AROUND", "Config", "Family", "Model", "Place", "Rule", "Rules", "less_one", "part", "place_of", "places"]
