"""A checkpoint without some of its channels, heads or layers, read as if it had been written so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lighten.compress.prune.experts import without
from lighten.compress.prune.parts import Cut, Parts
from lighten.compress.prune.structured import refit
from lighten.model.channels import Rows
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import read_layer


class Thinned(Checkpoint):
    """The checkpoint that is left. With Grams, the linears that lose inputs are repaired."""

    def __init__(
        self,
        whole: Checkpoint,
        cut: Cut,
        grams: Path | None,
        damp_percent: float,
        device: str = "cpu",
        parts: Parts | None = None,
    ) -> None:
        """Makes the cut. Without `grams` nothing is repaired. The repair is computed on `device`."""
        self.whole, self.cut, self.grams, self.damp_percent = whole, cut, grams, damp_percent
        self.parts = parts or Parts(whole)
        self._changes = self.parts.settings(cut)
        super().__init__(whole.path, {**whole.config, **self._changes})
        self.device = device
        self.left = [layer for layer in range(len(self.parts.prefixes)) if layer not in cut.layers]
        self.unrepaired: list[str] = []
        """Linears whose Gram could not be factorised."""

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that differ from the directory's own config.json."""
        return self._changes

    @cached_property
    def _names(self) -> dict[str, str]:
        """Name in the whole checkpoint of every tensor that is left, layers numbered anew."""
        numbers = {old: new for new, old in enumerate(self.left)}
        found = {}
        for name in self.whole.weight_map:
            place = self.parts.placed(name)
            if place is None:
                found[name] = name
            elif place[0] in numbers:
                prefix = self.parts.prefixes[place[0]]
                gone = self.cut.experts.get(place[0])
                new = self.parts.thinner(self.cut).renamed(name, gone, len(prefix)) if gone else name
                if new is not None:
                    found[self.parts.prefixes[numbers[place[0]]] + new.removeprefix(prefix)] = name
        return found

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """File name of the shard of every tensor that is left."""
        return {new: self.whole.weight_map[old] for new, old in self._names.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that is left."""
        whole = self.whole.shapes()
        changed = self.parts.shapes(self.cut)
        return {new: changed.get(old, whole[old]) for new, old in self._names.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor."""
        return self.some([name])[name]

    def some(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns tensors by their names. Each layer is cut once."""
        layers = {place[0] for name in names if (place := self.parts.placed(name))}
        cut: dict[str, torch.Tensor] = {}
        for at in layers:
            prefix = self.parts.prefixes[at]
            cut |= {prefix + rest: each for rest, each in self.tensors(prefix).items()}
        return {name: cut[name] if name in cut else self.whole.tensor(name) for name in names}

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns every tensor whose name starts with `prefix`, by the rest of its name."""
        if prefix not in self.parts.prefixes:
            return super().tensors(prefix)
        layer = self.left[self.parts.prefixes.index(prefix)]
        tensors = self.whole.tensors(self.parts.prefixes[layer])
        if gone := self.cut.experts.get(layer):
            tensors = self._without_experts(tensors, self.parts.prefixes[layer], gone)
        for channels, removed in self.parts.cuts(self.cut, layer):
            groups = _others(channels.groups, removed)
            by_linear: dict[str, list[Rows]] = {}
            for rows in channels.rows:
                by_linear.setdefault(rows.linear, []).append(rows)
            for linear, runs in by_linear.items():
                _take_outputs(tensors, linear, runs, removed)
            self._take_inputs(tensors, layer, channels.reader, _spread(groups, channels.size))
        return tensors

    def _without_experts(
        self, tensors: dict[str, torch.Tensor], prefix: str, gone: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Returns the tensors of a layer without those of some experts, by their new names."""
        thinner = self.parts.thinner(self.cut)
        found = {}
        for rest, tensor in tensors.items():
            new = thinner.renamed(prefix + rest, gone, len(prefix))
            if new is not None:
                cut = without(tensor, gone) if prefix + rest in thinner.stacked else tensor
                found[new.removeprefix(prefix)] = cut
        return found

    def _take_inputs(self, tensors: dict[str, torch.Tensor], layer: int, linear: str, kept: torch.Tensor) -> None:
        name = f"{linear}.weight"
        weight = tensors[name]
        tensors[name] = weight[:, kept].contiguous()
        if self.grams:
            grams, read_by = read_layer(self.grams, layer)
            gram = grams[read_by[linear]].to(self.device).matrix()
            try:
                found = refit(weight.to(self.device), gram, kept.to(self.device), self.damp_percent)
                tensors[name] = found.to(weight.dtype).cpu()
            except ArithmeticError:
                self.unrepaired.append(self.parts.prefixes[layer] + linear)


def _others(count: int, gone: Sequence[int]) -> torch.Tensor:
    left = torch.ones(count, dtype=torch.bool)
    left[list(gone)] = False
    return left.nonzero().flatten()


def _spread(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the channels of groups of `size` neighbours."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _take_outputs(tensors: dict[str, torch.Tensor], linear: str, runs: list[Rows], gone: Sequence[int]) -> None:
    stays = torch.ones(len(tensors[f"{linear}.weight"]), dtype=torch.bool)
    for rows in runs:
        stays[rows.start + _spread(torch.tensor(list(gone)), rows.size)] = False
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in tensors:
            tensors[name] = tensors[name][stays].contiguous()
