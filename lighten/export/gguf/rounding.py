"""A quantized GGUF file whose matrices are rounded again, so that their errors make good for each other.

llama.cpp has chosen the type of every tensor and written it. Here the bytes of the matrices that a sweep has the Gram
of are written anew, in the same types and so at the same places.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from lighten.export.gguf.compensate import compensated, losses_of
from lighten.export.gguf.linears import Matrices, in_order, matrices, order_of
from lighten.export.gguf.write import Draft
from lighten.model.gguf.blocks import KINDS, pack, unpack
from lighten.model.gguf_header import Tensor, read_header
from lighten.model.grams import LayerGrams, prefix_of, read_index, read_layer
from lighten.numerics.damping import damped, inverse_factor
from lighten.process.workers import crew, ordered
from lighten.step import Report, silent

DAMPING = 0.05
"""Share of the mean of diag(H) that is added to it."""
PASSES = 4
"""Number of times that scales and codes are refined in turn."""
COPIES = 8
"""Copies of a weight in float32 that are in memory at most."""


@dataclass
class Found:
    """What became of the matrices of one layer, or of several."""

    ratios: dict[str, float] = field(default_factory=dict)
    """Loss over the loss of llama.cpp's own rounding, by label; of an expert by itself."""
    kept: dict[str, str] = field(default_factory=dict)
    """Why a matrix was left as llama.cpp rounded it, by label."""


def compensate(file: Path, draft: Draft, grams: Path, report: Report = silent) -> dict[str, Any]:
    """Rounds the matrices of a file again, in place, one layer at a time.

    Args:
        file: quantized by llama.cpp, from `draft`.
        draft: the model.
        grams: directory of its sweep.
        report: called for every layer.

    Returns:
        The facts: `matrices` that were rounded again (each expert is one), `loss`, the mean ratio of their loss to
        that of llama.cpp's rounding, and `kept`, the others: how many for what reason, and which.
    """
    tensors = read_header(file).tensors
    index, matrices_of = read_index(grams), Matrices(draft)
    count = len(index["layers"])

    def layer(number: int) -> dict[str, Any]:
        with file.open("r+b") as opened, torch.inference_mode():
            work = _Layer(draft, tensors, opened.fileno(), matrices_of)
            found, inputs = read_layer(grams, number)
            readers: dict[str, list[tuple[str, int | None]]] = {}
            for linear, name in inputs.items():
                readers.setdefault(name, []).extend(matrices_of.of(f"{prefix_of(index, number)}{linear}.weight"))
            for name, each in readers.items():
                work.round(found, name, each)
            return asdict(work.found)

    inside = [draft.shapes[label][-2:] for label in matrices(draft) if draft.pieces[label].place.layer is not None]
    widest, inner = max(map(math.prod, inside)), max(shape[-1] for shape in inside)
    workers = crew(count, 4 * (COPIES * widest + 5 * inner**2), "cpu")
    all_of_them, threads = Found(), torch.get_num_threads()
    # a forked process must not wake threads that were left behind: each worker has one
    torch.set_num_threads(max(workers, 1) if workers > 1 else threads)
    try:
        for each in ordered(layer, count, workers, lambda done: report(done, count, f"layer {done}/{count}")):
            all_of_them.ratios |= each["ratios"]
            all_of_them.kept |= each["kept"]
    finally:
        torch.set_num_threads(threads)
    return facts_of(draft, all_of_them)


def facts_of(draft: Draft, found: Found) -> dict[str, Any]:
    """Returns the facts of `compensate`."""
    done = {label.partition("#")[0] for label in found.ratios}
    kept = {
        label: found.kept.get(label, "no Gram of its inputs")
        for label in matrices(draft)
        if label not in done or label in found.kept
    }
    reasons: dict[str, Counter[str]] = {}
    for label, why in kept.items():
        reasons.setdefault(why, Counter())[draft.names[label].split(".")[-2]] += 1
    mean = math.fsum(found.ratios.values()) / max(1, len(found.ratios))
    return {
        "method": "gptq",
        "matrices": len(found.ratios),
        "loss": round(mean, 4),
        "kept": [{"why": why, "count": named.total(), "tensors": dict(named)} for why, named in reasons.items()],
    }


@dataclass
class _Layer:
    """The matrices of a layer that are being rounded."""

    draft: Draft
    tensors: Mapping[str, Tensor]
    file: int
    """Descriptor of the open file."""
    matrices: Matrices
    found: Found = field(default_factory=Found)

    def round(self, grams: LayerGrams, name: str, readers: list[tuple[str, int | None]]) -> None:
        """Rounds the matrices that read one input."""
        known: tuple[torch.Tensor, torch.Tensor] | None = None
        gram = grams[name]

        def mean() -> torch.Tensor:
            return gram.matrix().div_(max(gram.tokens, 1))

        for label, expert in readers:
            tensor = self.tensors[self.draft.names[label]]
            kind = KINDS.get(type := GGMLQuantizationType(tensor.type).name)
            if kind is None:
                self.found.kept[label] = f"rounding knows no {type}"
                continue
            try:
                alike = order_of(self.draft, label, gram.width) is None
                metric, factor = known if known and alike else metric_of(self.draft, label, mean())
            except ArithmeticError as error:
                self.found.kept[label] = f"the Gram of its inputs is {error}"
                continue
            known = (metric, factor) if alike else None
            weight = self.matrices.weight(label, expert).float()
            size = tensor.size // (1 if expert is None else self.draft.shapes[label][0])
            start = tensor.start + size * (expert or 0)
            packed = torch.frombuffer(bytearray(os.pread(self.file, size, start)), dtype=torch.uint8)
            grid = unpack(packed.view(len(weight), -1), kind)
            better = compensated(weight, metric, factor, grid, PASSES)
            before, after = (float(losses_of(weight, metric, each).sum()) for each in (grid, better))
            os.pwrite(self.file, pack(better).numpy().tobytes(), start)
            self.found.ratios[label if expert is None else f"{label}#{expert}"] = after / before if before else 1.0


def metric_of(draft: Draft, label: str, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns H of the inputs of a matrix, damped, and the factor of its inverse, in the order of the file.

    Args:
        draft: the model.
        label: of the matrix.
        mean: of x xᵀ over its inputs, `[in, in]`.

    Raises:
        ArithmeticError: H is not positive definite.
    """
    mean = in_order(draft, label, mean)
    factor, damping = inverse_factor(mean, DAMPING)
    return damped(mean, damping), factor
