"""The parts of any model of transformers, found in its modules and in one run, not by names.

A block is an outermost `GradientCheckpointingLayer` of the decoder and the encoder: a layer of the model. Its linears
are its `nn.Linear` modules. Which of them read the same input, and what can take a scale from which, is seen in a run
of one block of each kind, with random weights of the model's own shapes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lighten.errors import RequestError
from lighten.model.empty import Filler
from lighten.model.experts import Slice, layout_of, shapes_of

EXPERTS = "matrices of experts, stored in a form that lighten does not take apart"
"""Reason for leaving weights alone that no method takes."""
ROUTERS = ("router", "gate", "shared_expert_gate")
"""Last parts of the names of small linears that choose experts. A linear with fewer outputs than `FEW` is one too."""
FEW = 32


@dataclass
class Linear:
    """A linear of a layer: a module of its own, or a matrix of an expert."""

    name: str
    """Name of its weight in quantized files, without the layer's prefix and ".weight"."""
    module: str
    """Name of the module in its block; of all experts, if it is a matrix of one of them."""
    shape: tuple[int, int]
    """`[out, in]`."""
    stored: Slice | None = None
    """Where it lies in a stored tensor, if that is not `name`.weight as it is. Its name is without the prefix."""
    inside: Slice | None = None
    """Where a matrix of an expert lies among the parameters of the module."""

    def matrix(self, tensors: dict[str, Any]) -> Any:
        """Returns a view of its weight, `[out, in]`, in the stored tensors of its layer, by name without the prefix."""
        return tensors[f"{self.name}.weight"] if self.stored is None else self.stored.of(tensors[self.stored.tensor])

    @staticmethod
    def of_json(value: dict[str, Any]) -> Linear:
        """Returns a linear from plain data."""
        parts = {name: Slice(**value[name]) for name in ("stored", "inside") if value.get(name)}
        return Linear(value["name"], value["module"], tuple(value["shape"]), **parts)


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

    def split(self, tensors: dict[str, Any]) -> None:
        """Replaces stored tensors that hold several matrices by these, in a dict by name without the prefix."""
        gone = set()
        for linear in self.linears:
            if linear.stored is not None:
                gone.add(linear.stored.tensor)
                tensors[f"{linear.name}.weight"] = linear.matrix(tensors)
        for name in gone - {f"{linear.name}.weight" for linear in self.linears}:
            del tensors[name]

    def as_stored(self, name: str, weight: Any) -> Any:
        """Returns a weight that `split` gave, as a model directory holds it by that name."""
        turned = any(
            linear.stored.transposed
            for linear in self.linears
            if linear.stored is not None and linear.stored.expert is None and name == linear.stored.tensor
        )
        return weight.t() if turned else weight

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
    others: dict[str, int] = field(default_factory=dict)
    """Weights of parts that are carried over as they are, by the beginning of their names: towers and projectors."""
    linears_of_others: list[str] = field(default_factory=list)
    """Names in the model of the linears that are in no layer and not the head. Loaders must be told of them."""
    unseen: str = ""
    """Why it is not known which linears the model calls; "" if it is known."""

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {**asdict(self), "covered": self.covered}

    @property
    def covered(self) -> int:
        """Number of weights in linears of layers."""
        return sum(linear.shape[0] * linear.shape[1] for layer in self.layers for linear in layer.linears)

    @staticmethod
    def of_json(value: dict[str, Any]) -> Anatomy:
        """Returns what `as_json` gave."""
        layers = [
            Layer(**{**each, "linears": [Linear.of_json(one) for one in each["linears"]]}) for each in value["layers"]
        ]
        return Anatomy(
            layers,
            value["weights"],
            value.get("others", {}),
            value.get("linears_of_others", []),
            value.get("unseen", ""),
        )

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

    def names(self, stored: str) -> list[str]:
        """Returns the stored name of a module, and its name in the model if that is another: loaders go by either."""
        found = self.placed(f"{stored}.")
        if found is None:
            return [stored]
        own = f"{self.layers[found[0]].module}.{found[1].removesuffix('.')}"
        return list(dict.fromkeys((stored, own)))

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
            if layout_of(module) is not None and not place.endswith("_bias"):
                found = _of_experts(each, layer.prefix, place, module, filler, shapes[each])
                layer.linears += found
                if not found:
                    layer.kept[each] = EXPERTS
            elif why := _why_kept(place, module, each in filler.converted):
                layer.kept[each] = why
            else:
                layer.linears.append(_linear(each.removeprefix(layer.prefix), place, module, shapes[each]))
        layers.append(layer)
    prefixes = [layer.prefix for layer in layers]
    if "" in prefixes or len(set(prefixes)) < len(prefixes):
        raise RequestError(
            f"the weights of {type(model).__name__} are not stored layer by layer ({layers[0].module}): calibrated "
            "methods cannot run on it"
        )
    anatomy = Anatomy(layers, sum(_size(shape) for shape in shapes.values()))
    _note_others(anatomy, model, filler, shapes)
    return anatomy


def _note_others(anatomy: Anatomy, model: Any, filler: Filler, shapes: dict[str, tuple[int, ...]]) -> None:
    """Notes the parts of a model beside its language model and its head."""
    names = {id(module): name for name, module in model.named_modules()}
    parts = [model.get_decoder(), *([model.get_encoder()] if model.config.is_encoder_decoder else [])]
    head = model.get_output_embeddings()
    _note_linears_outside(anatomy, model, head)
    inside = [names[id(part)] for part in parts]
    if "" in inside:
        return
    inside += [names[id(head)]] if head is not None else []
    around = {part.rpartition(".")[0] for part in inside}
    for name, place in filler.places.items():
        if any(place.startswith(f"{part}.") for part in inside):
            continue
        parent = max((each for each in around if place.startswith(f"{each}.") or not each), key=len)
        rest = place.removeprefix(f"{parent}.") if parent else place
        part = f"{parent}.{rest.split('.')[0]}" if parent else rest.split(".")[0]
        anatomy.others[part] = anatomy.others.get(part, 0) + _size(shapes[name])


def _note_linears_outside(anatomy: Anatomy, model: Any, head: Any) -> None:
    blocks = tuple(f"{layer.module}." for layer in anatomy.layers)
    anatomy.linears_of_others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(blocks)
    ]


def _linear(stored: str, place: str, module: Any, shape: tuple[int, ...]) -> Linear:
    """Returns a linear that is a module of its own. transformers' Conv1D has its inputs before its outputs."""
    name, own = stored.removesuffix(".weight"), place.removesuffix(".weight")
    if isinstance(module, nn.Linear):
        return Linear(name, own, (shape[0], shape[1]))
    turned = Slice(stored, transposed=True)
    return Linear(name, own, turned.shape(shape), turned)


def _of_experts(
    stored: str, prefix: str, place: str, module: Any, filler: Filler, shape: tuple[int, ...]
) -> list[Linear]:
    """Returns the matrices of experts in a stored tensor: one, or all; [] if its form is not known."""
    layout, shapes = layout_of(module), shapes_of(module)
    assert layout is not None
    path, _, parameter = place.rpartition(".")
    converter = filler.converters.get(stored)
    operations = [type(each).__name__ for each in converter.operations] if converter else []
    parts = [part for part in layout.parts if (spot := layout.place(part, 0, shapes)) and spot.tensor == parameter]
    if converter and "Concatenate" in operations:
        if len(converter.sources) != len(parts):
            return []
        parts = [parts[converter.source]]
    if len(shape) == 2 and operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        number = re.search(r"\.(\d+)\.", stored[len(prefix) - 1 :])
        if number is None or not stored.endswith(".weight") or layout.transposed:
            return []
        name, expert = stored.removeprefix(prefix).removesuffix(".weight"), int(number[1])
        spot = layout.place(parts[0], expert, shapes) if len(parts) == 1 else Slice(parameter, expert)
        return [Linear(name, path, (shape[0], shape[1]), None, spot)] if spot else []
    if len(shape) != 3 or not set(operations) <= {"Transpose", "Concatenate"}:
        return []
    turned = layout.transposed != ("Transpose" in operations and shape != shapes[parameter])
    found = []
    for expert in range(shape[0]):
        for part in parts:
            spot = layout.place(part, expert, shapes)
            if spot is None:
                continue  # an expert without a last matrix does nothing
            alone = "Concatenate" in operations
            own = Slice(
                stored.removeprefix(prefix),
                expert,
                turned,
                *((0, 1, None) if alone else (spot.start, spot.step, spot.outputs)),
            )
            found.append(Linear(f"{path}.{expert}.{part}", path, own.shape(shape), own, spot))
    return found


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
    if place.endswith("_bias"):
        return "biases"
    if module is not None and _has_stacked(module):
        return EXPERTS
    if not place.endswith(".weight") or not (isinstance(module, nn.Linear) or is_turned(module)):
        kind = type(module).__name__ if module is not None else "a parameter"
        return f"{kind}: not a linear"
    if converted:
        return "stored in another form than the model computes with"
    name = place.removesuffix(".weight").rpartition(".")[2]
    outputs = module.nf if is_turned(module) else module.out_features
    if outputs < FEW or name in ROUTERS:
        return "chooses experts or scales: small, and errors in it cost most"
    return None


def is_turned(module: Any) -> bool:
    """Returns whether a module is a linear with its inputs before its outputs."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _has_stacked(module: nn.Module) -> bool:
    """Returns whether a module has matrices stacked in one parameter, and is no convolution."""
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return not convolution and any(each.dim() == 3 for each in module.parameters(recurse=False))


def signature(block: nn.Module) -> tuple[Any, ...]:
    """Returns the modules of a block with the shapes of their weights: equal for layers of the same kind."""
    names = tuple((name, type(module).__name__) for name, module in block.named_modules())
    return names, tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())
