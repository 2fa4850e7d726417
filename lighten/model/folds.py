"""Scales that a norm or a linear can take over from the linears behind it, found by trying.

A linear whose weight columns are multiplied by s gives the same output when its inputs are divided by s. What makes
those inputs may be able to do that division: a norm, whose weight or 1 + weight is divided, or a linear, some of whose
outputs are. A block of each kind gets random weights and runs before and after. A fold is kept if the block's output
stays the same, so nothing is believed of names or of the order in which modules stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from lighten.model.discovery import Anatomy, Layer, Linear
from lighten.model.empty import Filler
from lighten.model.experts import LAST
from lighten.model.kinds import common, narrowed, of_kinds
from lighten.model.suspension import Call, Turn

TOLERANCE = 1e-4
"""Largest change of an output, as a share of the largest output, that counts as the same in float32."""
SPREAD = 0.3
"""Standard deviation of the logarithm of the scales that are tried."""
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
        self.first: dict[str, int] = {}
        """Number of the linears that were called before each."""
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
            def hook(_: Any, args: Any) -> None:
                group = groups.setdefault(key(args[0]), [])
                # readers of one input have one number, so that none of them counts as the maker of it
                self.first.setdefault(name, self.first[group[0]] if group else len(self.first))
                group.append(name)

            return hook

        def makes(name: str) -> Any:
            return lambda _, __, out: makers.__setitem__(key(out), name) if isinstance(out, torch.Tensor) else None

        hooks = []
        for name, module in self.block.named_modules():
            if name in self.names:
                hooks.append(module.register_forward_pre_hook(reads(name)))
            elif name and is_norm(module):
                hooks.append(module.register_forward_hook(makes(name)))
        self._run()
        for hook in hooks:
            hook.remove()
        return list(groups.values()), [makers.get(each) for each in groups]

    def _of_norm(self, readers: list[str], norm: str) -> Fold | None:
        module = self.block.get_submodule(norm)
        weight, width = module.get_parameter("weight"), self._columns(readers[0])
        matrices = [self._matrix(each) for each in readers]
        if weight.numel() != width:
            return None
        scale = torch.exp(SPREAD * torch.randn(width))
        for offset in (0.0, 1.0):
            with self._changed([*module.parameters(recurse=False), *matrices]):
                weight.copy_((weight + offset) / scale - offset)
                if getattr(module, "bias", None) is not None:
                    module.get_parameter("bias").div_(scale)
                for each in matrices:
                    each.mul_(scale)
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
            for before in (name for name in self.names if self.first.get(name, -1) < self.first[readers[0]]):
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
        """Returns whether the matrix before the last of an expert takes over the scale of the last one's inputs.

        The memory of a module's experts overlaps, so one scale serves all of them in the trial.
        """
        pairs = set()
        for parts in experts.values():
            before, down = _last_before(parts), parts.get("down")
            if down is None or before.inside is None or down.inside is None or before.shape[0] < down.shape[1]:
                return False
            pairs.add((replace(before.inside, expert=0), replace(down.inside, expert=0)))
        if len(pairs) != 1:
            return False
        before_spot, down_spot = pairs.pop()
        owner = self.block.get_submodule(module)
        last = down_spot.of(common(owner.get_parameter(down_spot.tensor)))
        width = last.shape[1]
        first = narrowed(before_spot, width).of(common(owner.get_parameter(before_spot.tensor)))
        with self._changed([first[-width:], last]):
            scale = torch.exp(SPREAD * torch.randn(width))
            first[-width:].div_(scale[:, None])
            last.mul_(scale)
            return self._same()

    def _takes(self, readers: list[str], before: str, start: int, count: int, repeats: int) -> bool:
        """Returns whether a slice of a linear's outputs takes over the scale of the readers' inputs."""
        outputs = slice(start, start + count)
        scale = 2.0 ** torch.randint(-1, 2, (count,))  # taken back without a copy of what was there, and exactly
        spread = scale if repeats == 1 else scale.view(-1, self.head_dim).repeat_interleave(repeats, 0).flatten()
        bias = getattr(self.block.get_submodule(before), "bias", None)
        makers = [self._matrix(before)[outputs], *([] if bias is None else [bias[outputs, None]])]
        matrices = [self._matrix(reader) for reader in readers]

        def multiply(made: torch.Tensor, read: torch.Tensor) -> None:
            for each in makers:
                each.mul_(made[:, None])
            for each in matrices:
                each.mul_(read)

        multiply(1 / scale, spread)
        try:
            return self._same()
        finally:
            multiply(scale, 1 / spread)

    def _columns(self, linear: str) -> int:
        return int(self._matrix(linear).shape[1])

    def _matrix(self, linear: str) -> torch.Tensor:
        """Returns the weight of a linear as `[out, in]`."""
        weight = self.block.get_submodule(linear).get_parameter("weight")
        return weight.t() if linear in self.turned else weight

    @contextmanager
    def _changed(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """Gives weights, or views of them, their own numbers back after a trial."""
        kept = [(each, each.clone()) for each in tensors]
        try:
            yield
        finally:
            for each, value in kept:
                each.copy_(value)


def _last_before(parts: dict[str, Linear]) -> Linear:
    """Returns the last of an expert's matrices that read its input."""
    return [linear for name, linear in parts.items() if name != "down"][-1]


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module may be a norm: all that it has is a vector of weights, and at most one of biases."""
    own = dict(module.named_parameters(recurse=False))
    vectors = all(each.dim() == 1 for each in own.values())
    return "weight" in own and own.keys() <= {"weight", "bias"} and vectors and not list(module.children())
