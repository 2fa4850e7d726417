"""Quantizing decoder layers: weights and Grams in, the tensors of the format out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lighten.compress.layers import Part, writing_part
from lighten.compress.patterns import ignored
from lighten.compress.quantize import fold
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.linears import Findings, Linears
from lighten.compress.quantize.settings import Quantize
from lighten.model.anatomy import HEAD, HEAD_WEIGHT, NORM_WEIGHT
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy
from lighten.model.folds import Fold
from lighten.model.formats import FORMATS
from lighten.model.grams import Gram, read_layer
from lighten.model.products import exact_products
from lighten.observe.streams import Inputs
from lighten.plugins import found_at

UNTOUCHED = 16
"""Number of "bits" of a weight that is left alone."""
TENSORS_PER_LINEAR = 6
ERROR_ROWS = 256
"""Number of outputs, evenly spaced, that the error of a group of linears is measured on."""
Scale = Callable[[Quantize, torch.Tensor, Gram, int, int], torch.Tensor]


@dataclass
class Layers:
    """The decoder layers of a checkpoint, and the way to quantize each."""

    step: Quantize
    checkpoint: Checkpoint
    grams: Path | None
    device: str
    out: Path
    anatomy: Anatomy
    folds: dict[int, list[Fold]]
    """What can take over scales, by the kind of the layer, for methods that scale inputs."""
    allocation: dict[str, int] | None = None
    """Bits of every linear, if a budget chose them."""

    @cached_property
    def left(self) -> dict[str, str]:
        """Why each linear is left alone that the format cannot hold, by its full name."""
        found = {}
        for layer in self.anatomy.layers:
            for linear in layer.linears:
                alone = self.step.experts_only and linear.inside is None
                if why := "this form is for experts" if alone else self.step.why_left(linear.shape):
                    found[layer.prefix + linear.name] = why
        return found

    def __len__(self) -> int:
        return len(self.anatomy.layers)

    @cached_property
    def rounds(self) -> Callable[[Quantize, Linears], list[Stored]]:
        """The method's function that rounds."""
        found: Callable[[Quantize, Linears], list[Stored]] = found_at(self.step.rounds)
        return found

    @cached_property
    def scales(self) -> Scale | None:
        """Function of the method that scales inputs; None if the method has none."""
        return found_at(self.step.scales_inputs) if self.step.scales_inputs else None

    @property
    def tensors_of_a_layer(self) -> int:
        """Maximum number of tensors of a stored layer."""
        counts = [len(layer.linears) for layer in self.anatomy.layers]
        for name in self.checkpoint.weight_map:
            if placed := self.anatomy.placed(name):
                counts[placed[0]] += 1
        return TENSORS_PER_LINEAR * max(counts)

    def read(self, index: int) -> tuple[str, dict[str, torch.Tensor], list[Inputs]]:
        """Returns the prefix, the tensors and the inputs of the linears of a layer, all of them on the device."""
        layer = self.anatomy.layers[index]
        prefix = layer.prefix
        tensors = {name: tensor.to(self.device) for name, tensor in self.checkpoint.tensors(prefix).items()}
        layer.split(tensors)
        if self.grams:
            grams, read_by = read_layer(self.grams, index, self.device)
            readers: dict[str, list[str]] = {}
            for linear, first in read_by.items():
                readers.setdefault(first, []).append(linear)
            inputs = [Inputs(first, linears, grams) for first, linears in readers.items()]
        else:
            inputs = [Inputs(linear.name, [linear.name]) for linear in layer.linears]
        return prefix, tensors, inputs

    def write(self, index: int) -> dict[str, Any]:
        """Writes the part of a layer. Returns the names of its tensors, and the findings."""
        with self.started(index) as work:
            for group in work.inputs:
                for linears in work.linears_of(group):
                    work.store(linears, self.rounds(self.step, linears))
            return work.finish()

    @contextmanager
    def started(self, index: int) -> Iterator[Work]:
        """Opens the part of a layer, whose linears are then rounded group by group."""
        with writing_part(self.out, index, self.tensors_of_a_layer) as part:
            prefix, tensors, inputs = self.read(index)
            folded = self.scale_inputs(index, prefix, tensors, inputs)
            yield Work(self, index, prefix, tensors, inputs, folded, part)

    def head(self) -> dict[str, torch.Tensor]:
        """Returns the stored output head, rounded to 8 bits. There is no Gram of its inputs."""
        name = HEAD
        with torch.inference_mode():
            weight = self.checkpoint.tensor(HEAD_WEIGHT).to(self.device)
            linears = Linears([name], [weight], 8, self.scale_type(), Findings())
            (stored,) = found_at(self.step.rounds_head)(self.step, linears)
        return {f"{name}.{kind}": tensor for kind, tensor in stored.tensors.items()}

    def chosen(self, name: str) -> int:
        """Returns the bits of a linear, by its full name; UNTOUCHED if it is left alone."""
        if name in self.left or ignored(name, self.step.ignore):
            return UNTOUCHED
        return self.allocation[name] if self.allocation is not None else self.step.bits or UNTOUCHED

    def scale_type(self) -> torch.dtype:
        """Returns the type of stored scales."""
        stored_as = FORMATS.get(self.step.format)
        if stored_as is None or not stored_as.scales_like_model:
            return torch.float16
        layer = next(layer for layer in self.anatomy.layers if layer.linears)
        known = NORM_WEIGHT in self.checkpoint.weight_map
        name = NORM_WEIGHT if known else f"{layer.prefix}{layer.linears[0].name}.weight"
        return self.checkpoint.tensor(name).dtype

    def scale_inputs(
        self, index: int, prefix: str, tensors: fold.Tensors, inputs: list[Inputs]
    ) -> dict[str, torch.Tensor]:
        """Scales the inputs of the layer's linears for a method that does so. Returns the scales by linear."""
        if self.scales is None:
            return {}
        head_dim = self.checkpoint.facts.head_dim
        kind = self.anatomy.layers[index].kind
        places = {frozenset(place.linears): place for place in self.folds.get(kind, ())}
        found: list[tuple[Fold, torch.Tensor]] = []
        for group in inputs:
            place = places.get(frozenset(group.linears))
            if place is None or any(self.chosen(prefix + name) == UNTOUCHED for name in (*group.linears, place.before)):
                continue  # a scale that one of them cannot take would change the model
            weight = torch.cat([tensors[f"{linear}.weight"] for linear in group.linears])
            scale = self.scales(self.step, weight, group.gram, place.repeats, head_dim)
            found.append((place, fold.exact(scale, tensors, place)))
        for place, scale in found:
            fold.fold(tensors, place, scale, head_dim)
        return {linear: scale for place, scale in found for linear in place.linears}


@dataclass
class Work:
    """A layer whose linears are being rounded."""

    layers: Layers
    index: int
    prefix: str
    tensors: dict[str, torch.Tensor]
    """Tensors that were not written yet, by name in the layer."""
    inputs: list[Inputs]
    folded: dict[str, torch.Tensor]
    """Scales of inputs, by linear."""
    part: Part
    findings: Findings = field(default_factory=Findings)
    gathered: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Tensors of rounded linears that wait for the others of the layer, by name in the layer."""

    def round(self, group: Inputs, gram: Gram, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `lighten.observe.streams.Work`."""
        found: dict[str, torch.Tensor] = {}
        moments = gram.matrix()
        del gram
        for linears in self.linears_of(group, moments, wanted):
            found |= self.store(linears, self.layers.rounds(self.layers.step, linears))
        return found

    def warn(self, text: str) -> None:
        """Takes a warning for the person."""
        self.findings.warnings.append(text)

    def linears_of(
        self, group: Inputs, moments: torch.Tensor | None = None, wanted: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[Linears]:
        """Yields the linears that read one input and get the same bits, to be rounded and stored.

        Args:
            group: the linears.
            moments: XᵀX `[in, in]` of the input; None for that of the sweep, if there was one.
            wanted: weights `[out, in]` to come close to, by linear; None for the layer's own.
        """
        if moments is None and group.swept is not None:
            moments = group.gram.matrix()
        scale = self.folded.get(group.first)
        if moments is not None and scale is not None:
            moments.div_(scale).div_(scale[:, None])
        largest = float(group.gram.absmax.max()) if self.layers.step.reads_largest else None
        for bits, members in self._by_bits(group.linears).items():
            names = [self.prefix + name for name in members]
            weights = [self.tensors.pop(f"{name}.weight") for name in members]
            targets = [wanted[name] for name in members] if wanted else None
            kind, reader = self.layers.scale_type(), self.prefix + group.first
            yield Linears(names, weights, bits, kind, self.findings, moments, reader, targets, largest)

    def store(self, linears: Linears, found: list[Stored]) -> dict[str, torch.Tensor]:
        """Writes rounded linears. Returns the weights that they stand for, `[out, in]`, by name in the layer."""
        for name, stored in zip(linears.names, found, strict=True):
            self.findings.bits[name] = linears.bits
            if self.layers.step.experts_only:
                self.gathered[name.removeprefix(self.prefix)] = stored.tensors
                continue
            for kind, tensor in stored.tensors.items():
                self.part.add(f"{name}.{kind}", tensor)
        _note_error(linears, found)
        names = (name.removeprefix(self.prefix) for name in linears.names)
        return {name: stored.weight for name, stored in zip(names, found, strict=True)}

    def finish(self) -> dict[str, Any]:
        """Writes the other tensors. Returns the names of all of them, and the findings."""
        layer = self.layers.anatomy.layers[self.index]
        if self.gathered:
            for name, tensor in found_at(self.layers.step.gathers)(layer, self.gathered).items():
                self.part.add(self.prefix + name, tensor)
        for name, tensor in self.tensors.items():
            self.part.add(self.prefix + name, layer.as_stored(name, tensor))
        return {"names": self.part.names, "findings": asdict(self.findings)}

    def _by_bits(self, linears: list[str]) -> dict[int, list[str]]:
        """Returns linears that read the same input by their bits. Notes those that are left alone."""
        found: dict[int, list[str]] = {}
        for name in linears:
            found.setdefault(self.layers.chosen(self.prefix + name), []).append(name)
        for name in found.pop(UNTOUCHED, []):
            why = self.layers.left.get(self.prefix + name)
            pattern = ignored(self.prefix + name, self.layers.step.ignore)
            why = why or f"left alone ({'ignore' if pattern else 'budget'})"
            self.findings.kept.append({"what": self.prefix + name, "why": why})
        return found


def _note_error(linears: Linears, found: list[Stored]) -> None:
    """Notes the share of the output that linears lose, if the Gram of their input is known and of use."""
    if linears.moments is None:
        return
    before, after = linears.target, torch.cat([each.weight for each in found])
    rows = slice(None, None, -(-len(before) // ERROR_ROWS))
    error = relative_error(before[rows], after[rows], linears.moments)
    if math.isfinite(error):  # else there is a warning already
        linears.findings.errors[linears.names[0]] = error


def relative_error(before: torch.Tensor, after: torch.Tensor, gram: torch.Tensor) -> float:
    """Returns the share of the output's energy that is lost: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), to three digits."""
    wide = before.float()
    change = wide - after
    with exact_products(torch.bfloat16):  # quick, and close enough to tell one layer from another
        lost = float(((change @ gram) * change).sum())
        energy = float(((wide @ gram) * wide).sum())
    return lost / energy if energy else 0.0
