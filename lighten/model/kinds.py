"""A visit to one filled block of every kind of layer, with random weights.

The model's own forward runs with a short text. A block of a kind that was seen is not run again: its answer is that of
the first one. The matrices of a module's experts overlap in memory and are narrow inside, so that all of them take less
room than one of the model's own. Their classes compute with the shapes that the matrices have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lighten.model.auto_classes import inputs_of
from lighten.model.discovery import Anatomy, Layer, blocks_of
from lighten.model.empty import Filler, compute_buffers, place_stand_ins
from lighten.model.experts import LAST, Slice, layout_of, shapes_of
from lighten.model.suspension import Call, Turn, turns

LENGTH = 12
"""Number of tokens of a trial."""
INSIDE = 32
"""Largest width between an expert's matrices in a trial."""


T = TypeVar("T")


def of_kinds(model: Any, anatomy: Anatomy, visit: Callable[[Layer, nn.Module, Turn, Call], T]) -> dict[int, T]:
    """Returns what `visit` finds in a layer of every kind.

    Args:
        model: without storage, float32, on no device. It is filled with random numbers, a block at a time.
        anatomy: of the model.
        visit: gets a layer, its filled block, its turn, and the answered call of a short text.
    """
    compute_buffers(model, "cpu")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # one expert at a time: the others would copy all matrices
    try:
        return _visited(model, anatomy, visit, every=False)
    except Exception:
        # layers may read what an earlier one left beside the states, and a class says in its own way that it is not
        # there. With every layer run it is there: whatever is wrong besides is raised once more
        return _visited(model, anatomy, visit, every=True)


def _visited(
    model: Any, anatomy: Anatomy, visit: Callable[[Layer, nn.Module, Turn, Call], T], *, every: bool
) -> dict[int, T]:
    """Runs the model with random numbers, and every block or one of each kind; returns the findings by kind."""
    blocks = blocks_of(model)
    layers = {layer.module: layer for layer in anatomy.layers}
    decodes = len(inputs_of(model, None)) > 1  # what follows the layers of an encoder runs with them
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
        beside = decodes and any(f"{name}.".startswith(f"{part}.") for part in anatomy.others)
        plain = not isinstance(module, nn.Embedding) and module is not model.get_output_embeddings()
        if plain and not inside and not beside:
            _randomise(module, recurse=False)
    place_stand_ins(model, anatomy.others, "cpu")
    found: dict[int, T] = {}
    answers: dict[int, Any] = {}

    def forward(_: int) -> None:
        model(**inputs_of(model, torch.arange(3, 3 + LENGTH)[None]))

    with torch.random.fork_rng(devices=[]), _seeded(), _random_embeddings(model):
        for turn in turns(forward, 1, blocks, ends=model.get_output_embeddings()):
            layer, block, (call,) = layers[turn.name], blocks[turn.name], turn.calls
            if layer.kind in found and not every:
                call.answer = _passed_on(call, answers[layer.kind])
                continue
            with torch.inference_mode():
                _randomise(block)
                turn.answer(call)
                answers[layer.kind] = call.answer
                if not found.get(layer.kind):
                    found[layer.kind] = visit(layer, block, turn, call)
            Filler.empty(block)
    return found


def _passed_on(call: Call, made: Any) -> Any:
    """Returns an answer like that of another block of the kind, with the call's own states in the first place."""
    leaves, spec = tree_flatten(made)
    given = next(leaf for leaf in tree_flatten((call.args, call.kwargs))[0] if isinstance(leaf, torch.Tensor))
    first = next(number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    if leaves[first].shape == given.shape:
        leaves[first] = given.clone()
    return tree_unflatten(leaves, spec)


@contextmanager
def _seeded() -> Iterator[None]:
    """Begins the random numbers of a trial, before any is drawn."""
    torch.manual_seed(0)
    yield


@contextmanager
def _random_embeddings(model: Any) -> Iterator[None]:
    """Lets embeddings without storage answer with random numbers."""

    def random(module: nn.Embedding) -> Any:
        def forward(ids: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
                return torch.randn(*ids.shape, module.embedding_dim)
            return type(module).forward(module, ids, *args, **kwargs)

        return forward

    embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    kept = [each.weight for each in embeddings]
    try:
        for each in embeddings:
            # some models read the weights themselves: one row in the place of all takes no room
            row = 0.1 * torch.randn(1, each.weight.shape[1]).expand(each.weight.shape)
            each.weight = nn.Parameter(row, requires_grad=False)
            each.__dict__["forward"] = random(each)
        yield
    finally:
        for each, weight in zip(embeddings, kept, strict=True):
            each.__dict__.pop("forward", None)
            each.weight = weight


@torch.no_grad()
def _randomise(module: nn.Module, *, recurse: bool = True) -> None:
    """Fills weights with numbers of a usual size. Vectors stay near 0 or 1, as their module begins with."""
    for each in module.modules() if recurse else [module]:
        if layout_of(each) is not None:
            _narrow(each)
        for name, parameter in list(each.named_parameters(recurse=False)):
            if common(parameter) is not parameter:
                continue
            filled = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                filled *= 0.6 / max(parameter.shape[-1], 1) ** 0.5
            else:
                filled = (0.0 if "bias" in name else 1.0) + 0.1 * filled
            each.register_parameter(name, nn.Parameter(filled, requires_grad=False))
        for name, buffer in list(each.named_buffers(recurse=False)):
            if buffer.is_meta:  # stored with the weights
                each.register_buffer(name, torch.full_like(buffer, 0.5, device="cpu"))


def _narrow(module: nn.Module) -> None:
    """Gives a module of experts random matrices that overlap, and biases without storage, of a smaller inner width."""
    layout, shapes = layout_of(module), shapes_of(module)
    assert layout is not None
    if LAST not in shapes:
        return
    inside = shapes[LAST][1 if layout.transposed else 2]
    width = min(inside, INSIDE)
    for name, parameter in list(module.named_parameters(recurse=False)):
        shape = list(parameter.shape)
        at = 1 if len(shape) == 3 and (name == LAST) == layout.transposed else len(shape) - 1
        if len(shape) == 3 or (name.endswith("_bias") and name != f"{LAST}_bias"):
            shape[at] = shape[at] // inside * width
        if len(shape) == 3:
            module.register_parameter(name, _overlapping(shape, by_columns=at == 1))
        else:
            module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))


def narrowed(spot: Slice, width: int) -> Slice:
    """Returns where a matrix lies in the stack of one expert that `common` gives, whose inner width is `width`."""
    if spot.outputs is None:
        return replace(spot, expert=0)
    start = spot.start if spot.step > 1 else spot.start // spot.outputs * width
    return replace(spot, expert=0, start=start, outputs=width)


def _overlapping(shape: list[int], by_columns: bool) -> nn.Parameter:
    """Returns matrices of experts, each of which begins one row or one column after the one before.

    No two are the same. In `common` the rows of all, or the columns of all, can be scaled together: those along which
    the matrices do not move. The caller lets them move along the layer's states, not along an expert's inner width.
    """
    experts, rows, columns = shape
    more = experts - 1
    # the gradients of other weights may be asked for, which tensors of inference mode refuse
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.randn(rows + (0 if by_columns else more), columns + (more if by_columns else 0))
        whole *= 0.6 / max(columns, 1) ** 0.5
        step = 1 if by_columns else whole.shape[1]
        parameter: Any = nn.Parameter(whole.as_strided(shape, (step, whole.shape[1], 1)), requires_grad=False)
        parameter.common = whole[None]
    return parameter  # type: ignore[no-any-return]


def common(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the memory of a block's weight: that of overlapping matrices as a stack of one matrix."""
    found: torch.Tensor = getattr(parameter, "common", parameter)
    return found
