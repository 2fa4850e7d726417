"""The parts of any model of transformers, found in its modules and in one run, not by names.

A block is an outermost `GradientCheckpointingLayer` of the decoder and the encoder: a layer of the model. Its linears
are its `nn.Linear` modules. Which of them read the same input, and what can take a scale from which, is seen in a run
of one block of each kind, with random weights of the model's own shapes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lighten.errors import RequestError
from lighten.model.empty import Filler

EXPERTS = "the matrices of all experts in one tensor"
"""Reason for leaving weights alone that no method takes."""
ROUTERS = ("router", "gate", "shared_expert_gate")
"""Last parts of the names of small linears that choose experts. A linear with fewer outputs than `FEW` is one too."""
FEW = 32


@dataclass
class Linear:
    """A linear of a layer whose weight is stored as one matrix."""

    name: str
    """Stored name of the module, without the layer's prefix."""
    module: str
    """Name of the module in its block."""
    shape: tuple[int, int]
    """`[out, in]`."""


@dataclass
class Layer:
    """A layer of the model, as its tensors are stored."""

    prefix: str
    """Beginning of the stored names of its tensors: "model.layers.0."."""
    module: str
    """Name of the block in the model."""
    kind: int
    """Number of its kind: layers of a kind have the same modules and shapes."""
    linears: list[Linear] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Weights of two and more dimensions that no method touches, by their stored names, and why."""

    def leave_unread(self, read: Container[str]) -> None:
        """Leaves alone the linears that were never called. The model reads their weights in another way."""
        for linear in [each for each in self.linears if each.name not in read]:
            self.linears.remove(linear)
            self.kept[f"{self.prefix}{linear.name}.weight"] = "the model reads it without calling it"


@dataclass
class Anatomy:
    """The layers of a model, and the counts of its weights."""

    layers: list[Layer]
    weights: int
    """All weights."""
    covered: int
    """Weights in linears of layers."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)

    @staticmethod
    def of_json(value: dict[str, Any]) -> Anatomy:
        """Returns what `as_json` gave."""
        layers = [
            Layer(
                **{
                    **each,
                    "linears": [Linear(one["name"], one["module"], tuple(one["shape"])) for one in each["linears"]],
                }
            )
            for each in value["layers"]
        ]
        return Anatomy(layers, value["weights"], value["covered"])

    @property
    def experts(self) -> list[str]:
        """Stored names of experts' weights, which no method takes."""
        return [name for layer in self.layers for name, why in layer.kept.items() if why == EXPERTS]

    def weights_of(self, linears: Container[str]) -> int:
        """Returns the number of weights of linears, by their full names."""
        return sum(
            linear.shape[0] * linear.shape[1]
            for layer in self.layers
            for linear in layer.linears
            if layer.prefix + linear.name in linears
        )

    def placed(self, name: str) -> tuple[int, str] | None:
        """Returns the number of the layer of a stored tensor, and its name in it; None outside of layers."""
        for index, layer in enumerate(self.layers):
            if name.startswith(layer.prefix):
                return index, name.removeprefix(layer.prefix)
        return None


def blocks_of(model: Any) -> dict[str, nn.Module]:
    """Returns the blocks of a model, by name, in the order of its modules.

    Raises:
        RequestError: nothing in it looks like a stack of layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    roots = [model.get_decoder(), *([model.get_encoder()] if model.config.is_encoder_decoder else [])]
    inside = {id(module) for root in roots for module in root.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{block}.") for block in found)
        if isinstance(module, GradientCheckpointingLayer) and outermost and id(module) in inside:
            found[name] = module
    if not found:
        lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
        name, longest = max(lists, key=lambda each: len(each[1]), default=("", nn.ModuleList()))
        found = {f"{name}.{index}": block for index, block in enumerate(longest)}
    if not found:
        raise RequestError(
            f"{type(model).__name__} has no list of layers that lighten finds: calibrated methods cannot run on it; "
            "nf4, int8 and exports that name it can"
        )
    return found


def anatomy_of(model: Any, filler: Filler, shapes: dict[str, tuple[int, ...]]) -> Anatomy:
    """Returns the anatomy of a model whose tensors are stored under other names than its modules have.

    Args:
        model: without storage.
        filler: knows where each stored tensor belongs.
        shapes: of the stored tensors, by stored name.
    """
    blocks = blocks_of(model)
    kinds: dict[tuple[Any, ...], int] = {}
    layers = []
    for name, block in blocks.items():
        stored = filler.names(name)
        kind = kinds.setdefault(signature(block), len(kinds))
        layer = Layer(_prefix(stored, name), name, kind)
        modules = dict(block.named_modules())
        for each in stored:
            if len(shapes[each]) < 2:
                continue
            place = filler.places[each].removeprefix(f"{name}.")
            module = modules.get(place.rpartition(".")[0])
            why = _why_kept(place, module, each in filler.converted)
            if why:
                layer.kept[each] = why
            else:
                rows, columns = shapes[each]
                linear = each.removeprefix(layer.prefix).removesuffix(".weight")
                layer.linears.append(Linear(linear, place.removesuffix(".weight"), (rows, columns)))
        layers.append(layer)
    prefixes = [layer.prefix for layer in layers]
    if "" in prefixes or len(set(prefixes)) < len(prefixes):
        raise RequestError(
            f"the weights of {type(model).__name__} are not stored layer by layer ({layers[0].module}): calibrated "
            "methods cannot run on it"
        )
    covered = sum(linear.shape[0] * linear.shape[1] for layer in layers for linear in layer.linears)
    total = sum(_size(shape) for shape in shapes.values())
    return Anatomy(layers, total, covered)


def _size(shape: Iterable[int]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def _prefix(stored: list[str], module: str) -> str:
    """Returns the beginning of the stored names of a layer: up to and with its number, where they have it."""
    if not stored:
        return f"{module}."
    first, last = min(stored), max(stored)
    parts = []
    for one, other in zip(first.split(".")[:-1], last.split("."), strict=False):
        if one != other:
            break
        parts.append(one)
    number = module.rpartition(".")[2]
    if number in parts:
        parts = parts[: parts.index(number) + 1]
    return "".join(f"{part}." for part in parts)


def _why_kept(place: str, module: Any, converted: bool) -> str | None:
    """Returns why no method touches a weight; None if it is a linear's."""
    if hasattr(module, "_is_expert_parallel") or (module is not None and _has_stacked(module)):
        return EXPERTS
    if not place.endswith(".weight") or not isinstance(module, nn.Linear):
        kind = type(module).__name__ if module is not None else "a parameter"
        return f"{kind}: not a linear"
    if converted:
        return "stored in another form than the model computes with"
    name = place.removesuffix(".weight").rpartition(".")[2]
    if module.out_features < FEW or name in ROUTERS:
        return "chooses experts or scales: small, and errors in it cost most"
    return None


def _has_stacked(module: nn.Module) -> bool:
    """Returns whether a module has matrices stacked in one parameter, and is no convolution."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return not convolution and any(each.dim() == 3 for each in module.parameters(recurse=False))


def signature(block: nn.Module) -> tuple[Any, ...]:
    """Returns the modules of a block with the shapes of their weights: equal for layers of the same kind."""
    names = tuple((name, type(module).__name__) for name, module in block.named_modules())
    return names, tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())
