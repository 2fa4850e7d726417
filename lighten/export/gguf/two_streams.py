"""A quantized GGUF file whose matrices are rounded anew in the order of the forward, against what really arrives.

`lighten.observe.streams` runs the model with its quantized layers beside the model without them, and says what each
matrix should come close to. Here that is rounded to the type that llama.cpp chose, and written over its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from lighten.export.gguf import ggml
from lighten.export.gguf.compensate import compensated, losses_of
from lighten.export.gguf.linears import Matrices, order_of
from lighten.export.gguf.quantize import channel_importance
from lighten.export.gguf.rounding import PASSES, Found, facts_of, metric_of
from lighten.export.gguf.types import PLAIN
from lighten.export.gguf.write import Draft
from lighten.model.blockwise import BlockwiseModel, known_anatomy
from lighten.model.discovery import Anatomy, Layer, Linear
from lighten.model.gguf.blocks import KINDS, Kind, pack, unpack
from lighten.model.gguf_header import Tensor, read_header
from lighten.model.grams import Gram, read_ids, read_layer, read_targets
from lighten.observe.streams import Inputs, Streams
from lighten.step import Context

ELSEWHERE = "it lies in the file in another way"


def round_in_streams(file: Path, draft: Draft, context: Context) -> dict[str, Any]:
    """Rounds the matrices of a file again, in place, one layer at a time.

    Args:
        file: quantized by llama.cpp, from `draft`.
        draft: the model.
        context: with the sweep over the model.

    Returns:
        The facts of `rounding.compensate`, and `propagation`. The loss is that on what arrives in the quantized model,
        beside that of ggml's own rounding of the same weights.
    """
    assert context.grams
    checkpoint, trusted = draft.checkpoint.checkpoint, context.trust_remote_code
    anatomy = known_anatomy(checkpoint, context.grams, trust_remote_code=trusted)
    tensors, warnings = read_header(file).tensors, context.warnings
    with file.open("r+b") as opened, torch.inference_mode():
        layers = FileLayers(draft, anatomy, context.grams, context.device, tensors, opened.fileno(), warnings)
        streams = Streams(layers, BlockwiseModel(checkpoint, context.device, trust_remote_code=trusted))
        for _ in streams.walk(read_ids(context.grams), read_targets(context.grams), context):
            pass
    return {**facts_of(draft, layers.found), **streams.facts}


@dataclass
class FileLayers:
    """The layers of a model whose matrices are rounded into a file."""

    draft: Draft
    anatomy: Anatomy
    grams: Path
    device: str
    tensors: Mapping[str, Tensor]
    file: int
    """Descriptor of the open file."""
    warnings: list[str]
    found: Found = field(default_factory=Found)

    def __post_init__(self) -> None:
        self.matrices = Matrices(self.draft)

    @contextmanager
    def started(self, index: int) -> Iterator[FileWork]:
        """Opens a layer, whose linears are then rounded group by group."""
        layer = self.anatomy.layers[index]
        stored = self.draft.checkpoint.checkpoint.tensors(layer.prefix)
        tensors = {name: tensor.to(self.device) for name, tensor in stored.items()}
        layer.split(tensors)
        grams, read_by = read_layer(self.grams, index)
        readers: dict[str, list[str]] = {}
        for linear, first in read_by.items():
            readers.setdefault(first, []).append(linear)
        yield FileWork(self, index, layer, tensors, [Inputs(first, each, grams) for first, each in readers.items()])


@dataclass
class FileWork:
    """A layer whose matrices are being rounded."""

    layers: FileLayers
    index: int
    layer: Layer
    tensors: dict[str, torch.Tensor]
    inputs: list[Inputs]

    def __post_init__(self) -> None:
        self.linears = {linear.name: linear for linear in self.layer.linears}

    @property
    def prefix(self) -> str:
        """Beginning of the full names of its tensors."""
        return self.layer.prefix

    def warn(self, text: str) -> None:
        """Takes a warning for the person."""
        self.layers.warnings.append(text)

    def finish(self) -> None:
        """Does nothing: what is not rounded again is in the file."""

    def round(self, group: Inputs, gram: Gram, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `lighten.observe.streams.Work`. What is left as llama.cpp rounded it is given as the file has it."""
        metric = _Metric(self.layers.draft, gram)
        found = {name: self._round(self.linears[name], metric, target.cpu()) for name, target in wanted.items()}
        return {name: each.to(self.layers.device) for name, each in found.items() if each is not None}

    def _round(self, linear: Linear, metric: _Metric, target: torch.Tensor) -> torch.Tensor | None:
        """Rounds the matrices of a file that a linear became. Returns its weight, `[out, in]`, if it is known."""
        layers, draft, stored = self.layers, self.layers.draft, f"{self.prefix}{linear.name}.weight"
        readers, turn = layers.matrices.of(stored), layers.matrices.turn(stored)
        turned = linear.stored is not None and linear.stored.expert is None and linear.stored.transposed

        def there(weight: torch.Tensor) -> list[torch.Tensor]:
            return turn.there(weight.t() if turned else weight, draft.model)

        own = there(self.tensors[f"{linear.name}.weight"].cpu())
        same = len(own) == len(readers) and all(
            torch.equal(part.float(), layers.matrices.weight(label, expert).float())
            for part, (label, expert) in zip(own, readers, strict=True)
        )
        if not same:
            layers.found.kept |= {label: ELSEWHERE for label, _ in readers}
            return None
        parts = [
            self._round_matrix(*reader, metric, part.float(), wanted.float())
            for reader, part, wanted in zip(readers, own, there(target), strict=True)
        ]
        back = turn.back(parts, draft.model)
        return back.t() if turned else back

    def _round_matrix(
        self, label: str, expert: int | None, metric: _Metric, own: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Rounds a matrix `[out, in]` of the file, if that can be done; returns what the file has then."""
        layers, draft = self.layers, self.layers.draft
        tensor = layers.tensors[draft.names[label]]
        type, named = GGMLQuantizationType(tensor.type).name, label if expert is None else f"{label}#{expert}"
        size = tensor.size // (1 if expert is None else draft.shapes[label][0])
        start = tensor.start + size * (expert or 0)
        kind = KINDS.get(type)
        try:
            if kind is None:
                raise ArithmeticError(f"rounding knows no {type}")
            packed, ratio = _rounded(target, type, kind, *metric.of(label))
        except ArithmeticError as error:
            why = str(error) if kind is None else f"the Gram of its inputs is {error}"
            layers.found.kept[label] = why
            return own if type in PLAIN else _read(os.pread(layers.file, size, start), type, target.shape)
        os.pwrite(layers.file, packed.numpy().tobytes(), start)
        layers.found.ratios[named] = ratio
        return unpack(packed, kind).weight()


class _Metric:
    """Second moments of the inputs of some matrices, as each of them reads them."""

    def __init__(self, draft: Draft, gram: Gram) -> None:
        self.draft, self.mean = draft, gram.matrix().cpu().div_(max(gram.tokens, 1))
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def of(self, label: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns H `[in, in]`, damped, the factor of its inverse, and the importance of the channels, `[in]`.

        Raises:
            ArithmeticError: H is not positive definite.
        """
        order = order_of(self.draft, label, len(self.mean))
        key = "" if order is None else label
        if key not in self.known:
            metric, factor = metric_of(self.draft, label, self.mean)
            squares = self.mean.diagonal() if order is None else self.mean.diagonal()[order]
            self.known[key] = metric, factor, torch.from_numpy(channel_importance(squares.numpy(), 1))
        return self.known[key]


def _rounded(
    target: torch.Tensor, type: str, kind: Kind, metric: torch.Tensor, factor: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Returns the packed rows of a matrix, and their loss beside that of ggml's own rounding."""
    packed = ggml.quantize(target.numpy(), type, importance.numpy())
    grid = unpack(torch.from_numpy(packed), kind)
    better = compensated(target, metric, factor, grid, PASSES)
    before, after = (float(losses_of(target, metric, each).sum()) for each in (grid, better))
    return pack(better), after / before if before else 1.0


def _read(packed: bytes, type: str, shape: torch.Size) -> torch.Tensor:
    """Returns the weights `[out, in]` that bytes of a file stand for."""
    rows = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(shape[0], -1)
    return torch.from_numpy(ggml.dequantize(rows.numpy(), type, shape[1]))
