"""What a model consists of: its layers, what every method would cover of its weights, and what stays and why.

The model is built without storage. Only the headers of its files are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.facts import ModelFacts

if TYPE_CHECKING:
    from lighten.model.checkpoint import Checkpoint
    from lighten.model.discovery import Anatomy, Layer, Linear

GROUPS = (128, 64, 32, -1)
"""Group sizes that are tried. The first that the model allows is shown."""
ZEROS = ("magnitude", "wanda", "sparsegpt")
SHARED = "Which linears read the same input is found by a sweep: it is stored with the Grams."
LOOKUP = "a lookup, not a product"
SMALL = "vectors of norms, biases and scales: too small to matter"
HEAD = "the output head, where errors cost most"


def inspect(model: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns what a model consists of, for a program.

    Raises:
        RequestError: the model does not exist, or nothing in it looks like a stack of layers.
        Failure: a file is damaged.
    """
    from lighten.model.source import find

    found = find(model, weights=False, trust_remote_code=trust_remote_code)
    if found.form == "gguf":
        return {"model": model, "form": "gguf", **_of_file(found.path, found.facts)}
    if found.form != "directory":
        raise RequestError(
            f"{model} is {found.form}, a graph whose layers are no modules any more: inspect the model that it was "
            "made from"
        )
    return {"model": model, "form": "directory", **_of_directory(found.path, trust_remote_code)}


def _of_directory(path: Path, trusted: bool) -> dict[str, Any]:
    import torch

    from lighten.model.discovery import anatomy_of, blocks_of
    from lighten.model.empty import Filler, empty_model
    from lighten.model.unpacked import Unpacked, open_checkpoint

    checkpoint = open_checkpoint(path)
    shapes = checkpoint.shapes()
    empty = empty_model(checkpoint, torch.bfloat16, trust_remote_code=trusted)
    filler = Filler(empty, shapes)
    anatomy = anatomy_of(empty, filler, shapes)
    classes = {name: type(block).__name__ for name, block in blocks_of(empty).items()}
    value = {
        "architecture": checkpoint.facts.architecture,
        "params": anatomy.weights,
        "layers": len(anatomy.layers),
        "kinds": _kinds(anatomy, classes, shapes),
        "parts": _parts(anatomy, filler, empty, shapes),
        "experts": _experts(anatomy, shapes),
        "shared_inputs": SHARED,
    }
    if isinstance(checkpoint, Unpacked):
        return {**value, "quantized": _quantized(checkpoint, anatomy), "methods": []}
    return {**value, "quantized": None, "methods": methods(checkpoint, anatomy)}


def _kinds(anatomy: Anatomy, classes: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Returns the kinds of layers: which layers are of the kind, and the linears of one of them."""
    found = []
    for kind in dict.fromkeys(layer.kind for layer in anatomy.layers):
        numbers = [number for number, layer in enumerate(anatomy.layers) if layer.kind == kind]
        first = anatomy.layers[numbers[0]]
        sizes = [math.prod(shape) for name, shape in shapes.items() if name.startswith(first.prefix)]
        found.append(
            {
                "class": classes[first.module],
                "layers": numbers,
                "linears": [{"name": each.name, "shape": list(each.shape)} for each in first.linears],
                "params_of_one": sum(sizes),
            }
        )
    return found


def _parts(anatomy: Anatomy, filler: Any, model: Any, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Returns the weights by what becomes of them: the linears first, then what stays, grouped by the reason."""
    linears = {name: None for layer in anatomy.layers for name in _stored(layer, experts=False)}
    experts = {name: None for layer in anatomy.layers for name in _stored(layer, experts=True)}
    kept = {name: why for layer in anatomy.layers for name, why in layer.kept.items()}
    groups: dict[tuple[str, str], list[str]] = {("linears", ""): [], ("experts", ""): []}
    for name, shape in shapes.items():
        what = "linears" if name in linears else "experts" if name in experts else "stays"
        why = "" if what != "stays" else kept.get(name) or _outside(name, shape, filler, model)
        groups.setdefault((what, why), []).append(name)
    return [
        {
            "what": what,
            "why": why or None,
            "tensors": len(names),
            "params": (size := sum(math.prod(shapes[name]) for name in names)),
            "share": size / anatomy.weights,
            "examples": list(Counter(map(pattern, names)))[:3],
        }
        for (what, why), names in groups.items()
        if names
    ]


def _stored(layer: Layer, *, experts: bool) -> list[str]:
    """Returns the stored tensors of a layer's linears, or of the matrices of its experts."""
    return [
        layer.prefix + (linear.stored.tensor if linear.stored else f"{linear.name}.weight")
        for linear in layer.linears
        if _of_expert(linear) == experts
    ]


def _of_expert(linear: Linear) -> bool:
    return linear.inside is not None and linear.inside.expert is not None


def _outside(name: str, shape: tuple[int, ...], filler: Any, model: Any) -> str:
    """Returns why a stored tensor stays that is no weight of two dimensions in a layer."""
    from torch import nn

    if name in filler.surplus:
        return "the language model has no place for them"
    if len(shape) < 2:
        return SMALL
    path = filler.places[name].rpartition(".")[0]
    module = model.get_submodule(path) if path else model
    if module is model.get_output_embeddings():
        return HEAD
    return LOOKUP if isinstance(module, nn.Embedding) else f"{type(module).__name__}, outside of the layers"


def pattern(name: str) -> str:
    """Returns a name with N in the place of its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def _experts(anatomy: Anatomy, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Returns the number of experts of a layer and the share of the weights in them; None if there are none."""
    taken = {name: None for layer in anatomy.layers for name in _stored(layer, experts=True)}
    if not (names := [*taken, *anatomy.experts]):
        return None
    size = sum(math.prod(shapes[name]) for name in names)
    known = [each.inside.expert for layer in anatomy.layers for each in layer.linears if each.inside]
    numbers = [number + 1 for number in known if number is not None]
    stacked = [shapes[name][0] for name in anatomy.experts if len(shapes[name]) > 2]
    layers = {placed[0] for name in names if (placed := anatomy.placed(name))}
    return {
        "count": max(numbers + stacked, default=None),
        "layers": sorted(layers),
        "params": size,
        "share": size / anatomy.weights,
        "examples": list(Counter(map(pattern, names)))[:3],
    }


def _quantized(checkpoint: Any, anatomy: Anatomy) -> dict[str, Any]:
    """Returns how a quantized directory is stored, and how much of it is."""
    settings = checkpoint.quantization or {}
    return {
        "format": checkpoint.method,
        **{name: settings[name] for name in ("bits", "group_size", "sym", "format") if name in settings},
        "linears": len(checkpoint.packed),
        "covers": anatomy.weights_of(checkpoint.packed) / anatomy.weights,
        "bytes": sum((checkpoint.path / file).stat().st_size for file in set(checkpoint.weight_map.values())),
        "advice": "no method takes it again: quantize or prune the model that it was made from",
    }


def methods(checkpoint: Checkpoint, anatomy: Anatomy) -> list[dict[str, Any]]:
    """Returns for every method the share of all weights that it would cover, and what it leaves alone."""
    from lighten.compress.quantize.methods import METHODS
    from lighten.model.blockwise import check_known

    refused = None
    try:
        check_known(checkpoint, anatomy)
    except RequestError as error:
        refused = str(error)
    names = [*(("quantize", name) for name in METHODS.usable()), *(("prune", name) for name in ZEROS)]
    if refused:
        return [{"step": step, "method": name, "covers": 0.0, "refused": refused} for step, name in names]
    return [{"step": step, "method": name, **_coverage(step, name, checkpoint.facts, anatomy)} for step, name in names]


def _coverage(kind: str, method: str, facts: ModelFacts, anatomy: Anatomy) -> dict[str, Any]:
    """Returns the share that a method covers with its default settings, and the largest group that the model allows."""
    from lighten.pipeline.steps import open_step

    problem = ""
    for settings in _settings(kind, method):
        step: Any = open_step(kind, {"method": method, **settings})
        try:
            step.check(facts)
        except RequestError as error:
            problem = problem or str(error)
            continue
        left: Counter[str] = Counter()
        covered = 0
        for layer in anatomy.layers:
            for linear in layer.linears:
                why = step.why_left(linear.shape) if kind == "quantize" else None
                covered += 0 if why else math.prod(linear.shape)
                left.update([why] if why else [])
        known = {"group_size": settings["group_size"]} if "group_size" in settings else {}
        return {**known, "covers": covered / anatomy.weights, "left": dict(left)}
    return {"covers": 0.0, "refused": problem}


def _settings(kind: str, method: str) -> Iterator[dict[str, Any]]:
    """Yields the settings to try besides the method."""
    from lighten.pipeline.steps import step_class

    if kind == "prune":
        yield {"sparsity": 0.5}
    elif "group_size" in step_class(kind, {"method": method}).model_fields:
        yield from ({"group_size": size} for size in GROUPS)
    else:
        yield {}


def _of_file(path: Path, facts: ModelFacts) -> dict[str, Any]:
    """Returns the tensors of a .gguf file by their types, and whether it can be a source."""
    from gguf import GGMLQuantizationType

    from lighten.model import gguf_source
    from lighten.model.gguf_header import open_any

    header = open_any(path)
    groups: dict[str, list[Any]] = {}
    for tensor in header.tensors.values():
        groups.setdefault(GGMLQuantizationType(tensor.type).name, []).append(tensor)
    refused = None
    try:
        gguf_source.check(path)
    except RequestError as error:
        refused = str(error)
    return {
        "architecture": header.arch,
        "params": facts.params,
        "layers": facts.layers,
        "types": [
            {
                "type": name,
                "tensors": len(each),
                "params": sum(math.prod(tensor.shape) for tensor in each),
                "bytes": sum(tensor.size for tensor in each),
                "examples": list(Counter(pattern(tensor.name) for tensor in each))[:3],
            }
            for name, each in sorted(groups.items(), key=lambda each: -sum(tensor.size for tensor in each[1]))
        ],
        "experts": header.fields.get(f"{header.arch}.expert_count") or None,
        "source": refused is None,
        "refused": refused,
    }
