"""Inputs of a linear that can go, with the outputs of other linears that then serve nothing: found by trying.

The columns of one linear are set to zero in a block with random weights. Outputs of other linears, on which the
block's result depended before and no longer depends, can go with them: gate and up for a channel of an MLP, queries,
keys and values for a group of heads. Fused linears show as several runs of outputs. Nothing is believed of names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lighten.facts import ModelFacts
from lighten.model import anatomy as llama
from lighten.model.backward import exchanged, floats
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy, Layer, Linear
from lighten.model.empty import Filler, empty_model
from lighten.model.experts import layout_of
from lighten.model.kinds import common, of_kinds
from lighten.model.suspension import Call, Turn

SILENT = 4
"""Number of groups that are tried before none of them is taken to serve anything."""


@dataclass(frozen=True)
class Rows:
    """Outputs of a linear: `size` for each group, those of group g from `start + g * size` on."""

    linear: str
    """Stored name of the linear in its layer."""
    start: int
    size: int


@dataclass(frozen=True)
class Channels:
    """Inputs of a linear in groups, each of which can go."""

    reader: str
    """Stored name of the linear in its layer."""
    groups: int
    size: int
    """Inputs of a group."""
    rows: tuple[Rows, ...]
    """Outputs of other linears that go with the groups."""

    @property
    def width(self) -> int:
        """Number of all inputs."""
        return self.groups * self.size


@dataclass(frozen=True)
class Prunable:
    """What can go from a layer, and why the rest cannot."""

    mlp: Channels | None = None
    heads: Channels | None = None
    reason: str = ""
    """Why there is no `mlp`."""


def prunable_of(checkpoint: Checkpoint, anatomy: Anatomy, *, trust_remote_code: bool = False) -> list[Prunable]:
    """Returns what can go from every layer of a model."""
    model = empty_model(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
    filler = Filler(model, checkpoint.weight_map)
    counts = _head_counts(model.config.get_text_config().to_dict())
    stored = {place: name for name, place in filler.places.items()}

    def visit(layer: Layer, block: nn.Module, turn: Turn, call: Call) -> Prunable:
        with torch.inference_mode(False), torch.enable_grad():
            return _Trials(layer, block, turn, call, stored).found(counts)

    kinds = of_kinds(model, anatomy, visit)
    return [kinds[layer.kind] for layer in anatomy.layers]


def of_llama(facts: ModelFacts) -> Prunable:
    """Returns what can go from a layer whose parts are known by name."""
    mlp = tuple(Rows(name, 0, 1) for name in (llama.GATE, llama.UP))
    size = facts.head_dim * (facts.heads // facts.kv_heads)
    heads = (Rows(llama.QUERY, 0, size), *(Rows(name, 0, facts.head_dim) for name in (llama.KEY, llama.VALUE)))
    return Prunable(
        Channels(llama.DOWN, facts.intermediate, 1, mlp), Channels(llama.OUTPUT, facts.kv_heads, size, heads)
    )


def _head_counts(config: dict[str, Any]) -> list[int]:
    """Returns numbers of heads that a config names, the smallest first: groups that share keys go before heads."""
    values = [value for name, value in config.items() if "heads" in name for value in _numbers(value)]
    return sorted({value for value in values if value > 1})


def _numbers(value: Any) -> Iterable[int]:
    each = value if isinstance(value, list) else [value]
    return [number for number in each if isinstance(number, int) and not isinstance(number, bool)]


class _Trials:
    """The trials on one block."""

    def __init__(self, layer: Layer, block: nn.Module, turn: Turn, call: Call, stored: dict[str, str]) -> None:
        self.block, self.turn = block, turn
        prefix = f"{layer.module}."
        self.linears = {linear.module: linear for linear in layer.linears if _own(linear)}
        self.biases = {f"{name}.bias" for name in self.linears}
        self.named = {name: stored.get(prefix + name, name) for name, _ in block.named_parameters()}
        stacks = tuple(f"{name}." for name, module in block.named_modules() if layout_of(module) is not None)
        self.watched = {name for name, _ in block.named_parameters() if not name.startswith(stacks)}
        self.tensors = {  # those of experts lie in one another
            name: each if common(each) is not each else each.clone()
            for name, each in (*block.named_parameters(), *block.named_buffers())
        }
        self.args, self.kwargs = exchanged((call.args, call.kwargs), torch.clone)
        self.base = self._alive({})

    def _alive(self, changed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns which rows of every parameter but those of experts the block's result depends on."""
        tensors = {**self.tensors, **changed}
        tensors = {name: each.detach().requires_grad_(name in self.watched) for name, each in tensors.items()}
        args, kwargs = exchanged((self.args, self.kwargs), torch.clone)
        before = exchanged(kwargs, lambda tensor: tensor)
        result = torch.func.functional_call(self.block, tensors, args, kwargs)
        outputs = [each for each in floats(result, before, kwargs) if each.requires_grad]
        numbers = torch.Generator().manual_seed(0)
        loss = torch.stack([(each * torch.randn(each.shape, generator=numbers)).sum() for each in outputs]).sum()
        names = sorted(self.watched)
        gradients = torch.autograd.grad(loss, [tensors[name] for name in names], allow_unused=True)
        return {
            name: gradient.flatten(1).abs().amax(1) > 0 if gradient.dim() > 1 else gradient.abs() > 0
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None and gradient.dim() > 0
        }

    def _dead(self, reader: str, first: int, size: int) -> dict[str, torch.Tensor]:
        """Returns rows that serve nothing any more if these inputs of the reader are not read, by parameter."""
        weight = self.tensors[f"{reader}.weight"].clone()
        weight[:, first : first + size] = 0
        alive = self._alive({f"{reader}.weight": weight})
        found = {name: base & ~alive.get(name, torch.zeros_like(base)) for name, base in self.base.items()}
        return {name: dead for name, dead in found.items() if bool(dead.any())}

    def _heard(self, reader: str, groups: range, size: int) -> tuple[int, dict[str, torch.Tensor]]:
        """Returns the first of some groups that anything serves, and what it is; some units never fire by chance."""
        for group in groups[:SILENT]:
            found = self._dead(reader, group * size, size)
            if any(name not in self.biases for name in found):
                return group, found
        return 0, {}

    def _rows(self, reader: str, groups: int) -> tuple[Rows, ...] | str | None:
        """Returns the outputs that go with groups of a reader's inputs; why they cannot go; None if there are none."""
        width = self.linears[reader].shape[1]
        if width % groups:
            return None
        size = width // groups
        place, first = self._heard(reader, range(groups), size)
        makers = [name for name in first if name not in self.biases]
        if not makers:
            return None
        for name in makers:
            if name.removesuffix(".weight") not in self.linears:
                return f"{self.named[name]} has the same channels, and is no linear"
        found = []
        for name in makers:
            runs = [(start - place * length, length) for start, length in _runs(first[name])]
            found += [Rows(self.linears[name.removesuffix(".weight")].name, start, length) for start, length in runs]
            for others in (range(place + 1, groups), range(groups - 1, place, -1)):
                group, gone = self._heard(reader, others, size)
                if not others or not gone:
                    continue
                dead = gone.get(name)
                wanted = [(start + group * length, length) for start, length in runs]
                if dead is None or _runs(dead) != wanted:
                    return f"{self.named[name]} has its channels in another order"
        return tuple(found)

    def found(self, counts: list[int]) -> Prunable:
        """Returns what can go from the block."""
        mlp: Channels | None = None
        heads: Channels | None = None
        reason = "no linear in it has inputs that other linears make channel by channel (experts are no such linears)"
        for reader, linear in self.linears.items():
            single = self._rows(reader, linear.shape[1])
            several = self._several(reader, counts)
            if several and (not isinstance(single, tuple) or len(single) < len(several[1])):
                groups, rows = several
                heads = heads or Channels(linear.name, groups, linear.shape[1] // groups, rows)
            elif isinstance(single, str):
                reason = single
            elif single and (mlp is None or linear.shape[1] > mlp.width):
                mlp = Channels(linear.name, linear.shape[1], 1, single)
        return Prunable(mlp, heads, "" if mlp else reason)

    def _several(self, reader: str, counts: list[int]) -> tuple[int, tuple[Rows, ...]] | None:
        """Returns the smallest number of groups of heads that can go, and their outputs: of three linears or runs."""
        width = self.linears[reader].shape[1]
        for groups in counts:
            if 1 < groups < width:
                rows = self._rows(reader, groups)
                if isinstance(rows, tuple) and (len(rows) > 2 or len({each.size for each in rows}) > 1):
                    return groups, rows
        return None


def _own(linear: Linear) -> bool:
    """Returns whether a linear is a module of its own, and its weight is stored as it is."""
    return linear.inside is None and linear.stored is None


def _runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Returns the first row and the number of rows of every run of true values."""
    found: list[tuple[int, int]] = []
    for row in mask.nonzero().flatten().tolist():
        if found and row == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((row, 1))
    return found
