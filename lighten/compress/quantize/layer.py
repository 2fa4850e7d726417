"""Quantizing one decoder layer: its weights and Grams in, what its format stores out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lighten.compress.layers import Add
from lighten.compress.patterns import ignored, zeros_of
from lighten.compress.quantize import awq, fold, formats, gptq, grid, smooth
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.grid import GroupSize, Quantized
from lighten.compress.quantize.settings import Quantize
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import Gram, read_layer
from lighten.model.products import exact_products
from lighten.model.stream import LAYERS

UNTOUCHED = 16
"""The "bits" of a weight that is left alone."""
HEAD = "lm_head.weight"
TENSORS_PER_LINEAR = 6
ERROR_ROWS = 256
"""Outputs, evenly spaced, that the error of a group of linears is measured on."""


@dataclass
class Inputs:
    """Linears of a layer that read the same input, and its second moments where there was a sweep."""

    first: str
    linears: list[str]
    gram: Gram | None = None


@dataclass
class Told:
    """What there is to say about the quantization of one layer, or of several."""

    bits: dict[str, int] = field(default_factory=dict)
    """Bits of every linear that was quantized, by full name."""
    kept: list[dict[str, str]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    """Linears that fell back to rounding to nearest."""
    warnings: list[str] = field(default_factory=list)

    def add(self, other: Told) -> None:
        """Takes over what another says."""
        self.bits |= other.bits
        self.errors |= other.errors
        self.kept += other.kept
        self.fallbacks += other.fallbacks
        self.warnings += other.warnings


@dataclass
class Layers:
    """The decoder layers of a checkpoint, and how to quantize each."""

    step: Quantize
    checkpoint: Checkpoint
    grams: Path | None
    device: str
    allocation: dict[str, int] | None = None
    """Bits of every linear, where a budget chose them."""

    def __len__(self) -> int:
        return self.checkpoint.facts.layers

    def read(self, index: int) -> tuple[str, dict[str, torch.Tensor], list[Inputs]]:
        """Returns the prefix, the tensors and the inputs of the linears of a layer, all of them on the device."""
        prefix = f"{LAYERS}{index}."
        tensors = {name: tensor.to(self.device) for name, tensor in self.checkpoint.tensors(prefix).items()}
        if self.grams:
            grams, read_by = read_layer(self.grams, index, self.device)
            inputs = [Inputs(first, [k for k, v in read_by.items() if v == first], g) for first, g in grams.items()]
        else:
            matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
            inputs = [Inputs(name, [name]) for name in (name.removesuffix(".weight") for name in matrices)]
        return prefix, tensors, inputs

    def quantize(self, index: int, add: Add) -> dict[str, Any]:
        """Hands over what a layer is stored as; returns a `Told`."""
        prefix, tensors, inputs = self.read(index)
        told = Told()
        for name, tensor in _Layer(self, prefix, tensors, inputs, told).run():
            add(prefix + name, tensor)
        return asdict(told)

    def head(self) -> dict[str, torch.Tensor]:
        """Returns what the output head is stored as, rounded to 8 bits: there is no Gram of its inputs."""
        step, kind = self.step, self.scale_type()
        integers = step.method in ("w8a8", "int8-dynamic")
        size: GroupSize = "tensor" if step.group_size == "tensor" else _integer(step.group_size or -1)
        with torch.inference_mode():
            found = grid.rtn(self.checkpoint.tensor(HEAD).to(self.device), 8, size, True, kind)
            stored = formats.int_quantized(found, kind) if integers else formats.pack_quantized(found, 8, True, kind)
        return {f"{HEAD.removesuffix('.weight')}.{name}": tensor for name, tensor in stored.tensors.items()}

    def chosen(self, name: str) -> int:
        """Returns the bits of a linear, by its full name; UNTOUCHED where it is left alone."""
        if ignored(name, self.step.ignore):
            return UNTOUCHED
        if self.allocation is not None:
            return self.allocation[name]
        assert self.step.bits
        return self.step.bits

    def scale_type(self) -> torch.dtype:
        """Returns the type that scales are stored in: float16, but the model's own in compressed-tensors."""
        if self.step.format != "compressed-tensors":
            return torch.float16
        return self.checkpoint.tensor("model.norm.weight").dtype


@dataclass
class _Layer:
    """One layer under way."""

    of: Layers
    prefix: str
    tensors: dict[str, torch.Tensor]
    inputs: list[Inputs]
    told: Told

    def run(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors to write, by their names in the layer."""
        step, prefix, tensors = self.of.step, self.prefix, self.tensors
        scales = self._scale()
        for group in self.inputs:
            gram = group.gram.matrix() if group.gram else None
            scale = scales.get(group.first)
            if gram is not None and scale is not None:
                gram.div_(scale).div_(scale[:, None])
            by_bits: dict[int, list[str]] = {}
            for linear in group.linears:
                by_bits.setdefault(self.of.chosen(prefix + linear), []).append(linear)
            for bits, linears in by_bits.items():
                if bits == UNTOUCHED:
                    for linear in linears:
                        why = "ignore" if ignored(prefix + linear, step.ignore) else "budget"
                        self.told.kept.append({"what": prefix + linear, "why": f"left alone ({why})"})
                    continue
                weights = [tensors.pop(f"{linear}.weight") for linear in linears]
                stored = list(self._store(weights, gram, bits, prefix + group.first))
                for linear, each in zip(linears, stored, strict=True):
                    self.told.bits[prefix + linear] = bits
                    for name, tensor in each.tensors.items():
                        yield f"{linear}.{name}", tensor
                if gram is not None:
                    before, after = torch.cat(weights), torch.cat([each.weight for each in stored])
                    rows = slice(None, None, -(-len(before) // ERROR_ROWS))
                    error = relative_error(before[rows], after[rows], gram)
                    if math.isfinite(error):  # else the Gram was of no use, and there is a warning already
                        self.told.errors[prefix + linears[0]] = error
        yield from tensors.items()

    def _scale(self) -> dict[str, torch.Tensor]:
        """Scales the inputs of the layer's linears for the methods that do so; returns the scales that were folded."""
        step, prefix, tensors, inputs = self.of.step, self.prefix, self.tensors, self.inputs
        if step.method not in ("awq", "w8a8"):
            return {}
        head_dim = self.of.checkpoint.facts.head_dim
        scales: dict[str, torch.Tensor] = {}
        for group in inputs:
            repeats = fold.copies(tensors, group.first)
            touched = [*group.linears, fold.BEFORE.get(group.first, "")]
            if not repeats or any(self.of.chosen(prefix + name) == UNTOUCHED for name in touched):
                continue  # a scale that one of them cannot take would change the model
            assert group.gram
            weight = torch.cat([tensors[f"{linear}.weight"] for linear in group.linears])
            if step.method == "awq":
                scale = awq.search_scale(
                    weight,
                    group.gram.matrix(),
                    bits=4,
                    group_size=_integer(step.group_size),
                    sym=False,
                    repeats=repeats,
                    head_dim=head_dim,
                )
            else:
                assert step.alpha is not None
                scale = smooth.smooth(weight, group.gram.absmax, step.alpha, repeats, head_dim)
            scales[group.first] = fold.exact(scale, tensors, group.first)
        for group in inputs:
            if group.first in scales:
                fold.fold(tensors, group.first, group.linears, scales[group.first], head_dim)
        return scales

    def _store(self, weights: list[torch.Tensor], gram: torch.Tensor | None, bits: int, name: str) -> Iterator[Stored]:
        """Quantizes linears that read the same input, and yields each as its format stores it."""
        step, kind = self.of.step, self.of.scale_type()
        if step.method in ("nf4", "fp4", "int8", "fp8"):
            for weight in weights:
                if step.method == "int8":
                    yield formats.bnb_8bit(weight)
                elif step.method == "fp8":
                    yield formats.float_quantized(weight, kind)
                else:
                    assert step.block_size and step.double_quant is not None
                    yield formats.bnb_4bit(weight, step.method, step.block_size, step.double_quant)
            return
        gone = zeros_of(weights)
        found = self._codes(torch.cat(weights), gram, bits, name, gone)
        start = 0
        for weight in weights:
            part = found.outputs(start, start := start + len(weight))
            if step.format == "gptq":
                yield formats.gptq(part, bits)
            elif step.method == "awq":
                yield formats.awq(part)
            elif step.method in ("w8a8", "int8-dynamic"):
                yield formats.int_quantized(part, kind)
            else:
                yield formats.pack_quantized(part, bits, bool(step.sym), kind)

    def _codes(
        self, weight: torch.Tensor, gram: torch.Tensor | None, bits: int, name: str, gone: torch.Tensor | None
    ) -> Quantized:
        """Returns the codes that the method chooses; weights that are `gone` stay zero."""
        step, kind = self.of.step, self.of.scale_type()
        if step.method in ("w8a8", "int8-dynamic"):
            return grid.rtn(weight, 8, -1, True, kind)
        size: GroupSize = "tensor" if step.group_size == "tensor" else _integer(step.group_size)
        sym = bool(step.sym)
        if step.method == "rtn":
            return grid.rtn(weight, bits, size, sym, kind)
        assert gram is not None
        if step.method == "awq":
            return awq.clip(weight, gram, bits=bits, group_size=_integer(size), sym=sym)
        assert step.damp_percent is not None
        try:
            found = gptq.gptq(
                weight,
                gram,
                bits=bits,
                group_size=_integer(size),
                sym=sym,
                desc_act=bool(step.desc_act),
                damp_percent=step.damp_percent,
                kind=kind,
                gone=gone,
            )
        except ArithmeticError as error:
            self.told.warnings.append(f"{name}: rounded to nearest, for its Gram is {error}; give it more text")
            self.told.fallbacks.append(name)
            return grid.rtn(weight, bits, size, sym, kind)
        if found.damping != step.damp_percent:
            self.told.warnings.append(f"{name}: damping raised from {step.damp_percent:g} to {found.damping:g}")
        return found


def _integer(size: Any) -> int:
    assert isinstance(size, int)
    return size


def relative_error(before: torch.Tensor, after: torch.Tensor, gram: torch.Tensor) -> float:
    """Returns the share of the output's energy that is lost: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), to three digits."""
    wide = before.float()
    change = wide - after
    with exact_products(torch.bfloat16):  # quick, and close enough to tell one layer from another
        lost = float(((change @ gram) * change).sum())
        energy = float(((wide @ gram) * wide).sum())
    return lost / energy if energy else 0.0
