"""Scales that a norm or a linear can take over from the linears behind it, found by trying.

A linear whose weight columns are multiplied by s gives the same output when its inputs are divided by s. What makes
those inputs may be able to do that division: a norm, whose weight or 1 + weight is divided, or a linear, some of whose
outputs are. A block of each kind gets random weights and runs before and after. A fold is kept if the block's output
stays the same, so nothing is believed of names or of the order in which modules stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lighten.model.auto_classes import inputs_of
from lighten.model.discovery import Anatomy, Layer, Linear, blocks_of
from lighten.model.empty import Filler, compute_buffers, place_stand_ins
from lighten.model.experts import LAST
from lighten.model.suspension import Call, Turn, turns

LENGTH = 12
"""Number of tokens of a trial."""
TOLERANCE = 1e-4
"""Largest change of an output, as a share of the largest output, that counts as the same in float32."""
SPREAD = 0.3
"""Standard deviation of the logarithm of the scales that are tried."""


T = TypeVar("T")
MOST_REPEATS = 64
"""Largest number of query heads of a key head that is tried."""


@dataclass(frozen=True)
class Fold:
    """A scale of the inputs of some linears, and what takes it over."""

    linears: tuple[str, ...]
    """Every linear that reads the inputs, by its stored name in the layer."""
    before: str
    """Norm or linear that makes the inputs, by its stored name in the layer."""
    offset: float = 0.0
    """1 if a norm multiplies by 1 + weight."""
    start: int = 0
    """First output of a linear that is divided."""
    repeats: int = 1
    """Number of heads that repeat each channel, and so share its scale."""


def folds_of(model: Any, anatomy: Anatomy, filler: Filler, head_dim: int) -> dict[int, list[Fold]]:
    """Returns the folds of every kind of layer.

    Args:
        model: without storage, float32, on no device. It is filled with random numbers, a block at a time.
        anatomy: of the model.
        filler: knows the stored names of its modules.
        head_dim: channels of a head, for values that several heads read.
    """
    stored = {place: name for name, place in filler.places.items()}

    shared = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}

    def alone(layer: Layer, fold: Fold) -> bool:
        """Returns whether nothing that a fold changes is also a part of another layer."""
        names = (f"{layer.prefix}{name}.weight" for name in (*fold.linears, fold.before))
        return not any(filler.places.get(name, name) in shared for name in names)

    def trials(layer: Layer, block: nn.Module, turn: Turn, call: Call) -> list[Fold]:
        found = _Trials(layer, block, turn, call, head_dim, stored).all()
        return [fold for fold in found if alone(layer, fold)]

    return of_kinds(model, anatomy, trials)


def of_kinds(model: Any, anatomy: Anatomy, visit: Callable[[Layer, nn.Module, Turn, Call], T]) -> dict[int, T]:
    """Returns what `visit` finds in a layer of every kind.

    Args:
        model: without storage, float32, on no device. It is filled with random numbers, a block at a time.
        anatomy: of the model.
        visit: gets a layer, its filled block, its turn, and the answered call of a short text.
    """
    compute_buffers(model, "cpu")
    try:
        return _visited(model, anatomy, visit, every=False)
    except (KeyError, IndexError, AttributeError, TypeError, RuntimeError):
        # some layers read what an earlier one left beside the states: then each has to run
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

    with torch.random.fork_rng(devices=[]), _random_embeddings(model):
        torch.manual_seed(0)
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
            row = torch.randn(1, each.weight.shape[1]).expand(each.weight.shape)
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
        for name, parameter in list(each.named_parameters(recurse=False)):
            filled = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                filled *= 0.6 / max(parameter.shape[-1], 1) ** 0.5
            else:
                filled = (0.0 if "bias" in name else 1.0) + 0.1 * filled
            each.register_parameter(name, nn.Parameter(filled, requires_grad=False))
        for name, buffer in list(each.named_buffers(recurse=False)):
            if buffer.is_meta:  # stored with the weights
                each.register_buffer(name, torch.full_like(buffer, 0.5, device="cpu"))


class _Trials:
    """The trials on one block."""

    def __init__(
        self, layer: Layer, block: nn.Module, turn: Turn, call: Call, head_dim: int, stored: dict[str, str]
    ) -> None:
        self.layer, self.block, self.turn, self.call, self.head_dim = layer, block, turn, call, head_dim
        self.stored = stored
        own = [linear for linear in layer.linears if linear.inside is None]
        self.names = {linear.module: linear.name for linear in own}
        self.turned = {linear.module for linear in own if linear.stored is not None and linear.stored.transposed}
        self.base = self._run()
        self.largest = max(float(each.abs().max()) for each in self.base)

    def _run(self) -> list[torch.Tensor]:
        answer = self.turn.run(*self.call.args, **self.call.kwargs)
        return [leaf for leaf in tree_flatten(answer)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    def _same(self) -> bool:
        """Returns whether the block gives the same output as before the trial."""
        return all(
            bool((found - base).abs().max() <= TOLERANCE * self.largest)
            for found, base in zip(self._run(), self.base, strict=True)
        )

    def all(self) -> Iterator[Fold]:
        """Yields the folds of every input that can be scaled."""
        groups, norms = self._watch()
        for readers, norm in zip(groups, norms, strict=True):
            fold = self._of_norm(readers, norm) if norm else None
            fold = fold or self._of_linear(readers)
            if fold:
                yield fold
        yield from self._of_experts()

    def _watch(self) -> tuple[list[list[str]], list[str | None]]:
        """Returns linears that read the same input, and the module that made it if that is a norm."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        makers: dict[tuple[Any, ...], str] = {}
        held = []  # a freed tensor's place could be taken by another

        def key(tensor: torch.Tensor) -> tuple[Any, ...]:
            held.append(tensor)
            return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()

        def reads(name: str) -> Any:
            return lambda _, args: groups.setdefault(key(args[0]), []).append(name)

        def makes(name: str) -> Any:
            return lambda _, __, out: makers.__setitem__(key(out), name) if isinstance(out, torch.Tensor) else None

        hooks = []
        for name, module in self.block.named_modules():
            if name in self.names:
                hooks.append(module.register_forward_pre_hook(reads(name)))
            elif name and _is_norm(module):
                hooks.append(module.register_forward_hook(makes(name)))
        self._run()
        for hook in hooks:
            hook.remove()
        return list(groups.values()), [makers.get(each) for each in groups]

    def _of_norm(self, readers: list[str], norm: str) -> Fold | None:
        module = self.block.get_submodule(norm)
        weight, width = module.get_parameter("weight"), self._columns(readers[0])
        if weight.numel() != width:
            return None
        scale = torch.exp(SPREAD * torch.randn(width))
        for offset in (0.0, 1.0):
            with self._changed([module, *map(self.block.get_submodule, readers)]):
                weight.copy_((weight + offset) / scale - offset)
                if getattr(module, "bias", None) is not None:
                    module.get_parameter("bias").div_(scale)
                for reader in readers:
                    self._matrix(reader).mul_(scale)
                same = self._same()
            name = self.stored.get(f"{self.layer.module}.{norm}.weight", "")
            if same and name.startswith(self.layer.prefix):
                own = name.removeprefix(self.layer.prefix).removesuffix(".weight")
                return Fold(tuple(self.names[each] for each in readers), own, offset)
        return None

    def _of_linear(self, readers: list[str]) -> Fold | None:
        width = self._columns(readers[0])
        for repeats in (repeats for repeats in range(1, MOST_REPEATS + 1) if width % repeats == 0):
            count = width // repeats
            if repeats > 1 and count % self.head_dim:
                continue
            for before in (name for name in self.names if name not in readers):
                outputs = self._matrix(before).shape[0]
                for start in dict.fromkeys((0, outputs - count, outputs - 2 * count)):
                    if 0 <= start <= outputs - count and self._takes(readers, before, start, count, repeats):
                        names = tuple(self.names[each] for each in readers)
                        return Fold(names, self.names[before], 0.0, start, repeats)
        return None

    def _of_experts(self) -> Iterator[Fold]:
        """Yields folds between the matrices of an expert. What holds for the first ones holds for all of a module."""
        for module in dict.fromkeys(linear.module for linear in self.layer.linears if linear.inside is not None):
            experts: dict[int, dict[str, Linear]] = {}
            for linear in self.layer.linears:
                if linear.module == module and linear.inside is not None and linear.inside.expert is not None:
                    part = "down" if linear.inside.tensor == LAST else linear.name
                    experts.setdefault(linear.inside.expert, {})[part] = linear
            if self._expert_takes(module, experts):
                for parts in experts.values():
                    down, before = parts["down"], _last_before(parts)
                    yield Fold((down.name,), before.name, 0.0, before.shape[0] - down.shape[1])

    def _expert_takes(self, module: str, experts: dict[int, dict[str, Linear]]) -> bool:
        """Returns whether the matrix before the last of every expert takes over the scale of the last one's inputs."""
        owner = self.block.get_submodule(module)
        with self._changed([owner]):
            for parts in experts.values():
                before, down = _last_before(parts), parts.get("down")
                if down is None or before.inside is None or down.inside is None:
                    return False
                start = before.shape[0] - down.shape[1]
                if start < 0:
                    return False
                scale = torch.exp(SPREAD * torch.randn(down.shape[1]))
                before.inside.of(owner.get_parameter(before.inside.tensor))[start:].div_(scale[:, None])
                down.inside.of(owner.get_parameter(down.inside.tensor)).mul_(scale)
            return self._same()

    def _takes(self, readers: list[str], before: str, start: int, count: int, repeats: int) -> bool:
        """Returns whether a slice of a linear's outputs takes over the scale of the readers' inputs."""
        module = self.block.get_submodule(before)
        scale = torch.exp(SPREAD * torch.randn(count))
        spread = scale if repeats == 1 else scale.view(-1, self.head_dim).repeat_interleave(repeats, 0).flatten()
        with self._changed([module, *map(self.block.get_submodule, readers)]):
            self._matrix(before)[start : start + count].div_(scale[:, None])
            if getattr(module, "bias", None) is not None:
                module.get_parameter("bias")[start : start + count].div_(scale)
            for reader in readers:
                self._matrix(reader).mul_(spread)
            return self._same()

    def _columns(self, linear: str) -> int:
        return int(self._matrix(linear).shape[1])

    def _matrix(self, linear: str) -> torch.Tensor:
        """Returns the weight of a linear as `[out, in]`."""
        weight = self.block.get_submodule(linear).get_parameter("weight")
        return weight.t() if linear in self.turned else weight

    @contextmanager
    def _changed(self, modules: list[nn.Module]) -> Iterator[None]:
        """Gives modules their own weights back after a trial."""
        kept = [(each, each.clone()) for module in modules for each in module.parameters(recurse=False)]
        try:
            yield
        finally:
            for parameter, value in kept:
                parameter.copy_(value)


def _last_before(parts: dict[str, Linear]) -> Linear:
    """Returns the last of an expert's matrices that read its input."""
    return [linear for name, linear in parts.items() if name != "down"][-1]


def _is_norm(module: nn.Module) -> bool:
    """Returns whether a module may be a norm: all that it has is a vector of weights, and at most one of biases."""
    own = dict(module.named_parameters(recurse=False))
    vectors = all(each.dim() == 1 for each in own.values())
    return "weight" in own and own.keys() <= {"weight", "bias"} and vectors and not list(module.children())
