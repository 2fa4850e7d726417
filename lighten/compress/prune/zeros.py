"""Writing a model with zeros among its weights: magnitude, Wanda, SparseGPT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lighten.compress.layers import join, writing_part
from lighten.compress.patterns import ignored
from lighten.compress.prune import sparse
from lighten.compress.prune.settings import Prune
from lighten.model.blockwise import check_known, doubts, known_anatomy
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy
from lighten.model.grams import Gram, read_layer
from lighten.model.shards import ShardWriter
from lighten.process.workers import crew, ordered
from lighten.step import Context

HONEST = (
    "its zeros save neither bytes nor time: files and dense runtimes hold and multiply them like any other number; "
    "what they are worth is a runtime with sparse kernels, or a start for training"
)


def write(step: Prune, checkpoint: Checkpoint, out: Path, context: Context) -> dict[str, Any]:
    """Writes the model with zeros in the linears of its layers; returns the facts."""
    facts = checkpoint.facts
    anatomy = known_anatomy(checkpoint, context.grams, trust_remote_code=context.trust_remote_code)
    check_known(checkpoint, anatomy)
    context.warnings += doubts(anatomy)
    count = len(anatomy.layers)
    workers = crew(count, step.bytes_of_a_layer(facts), context.device)
    threshold = _threshold(step, checkpoint, anatomy) if step.scope == "global" else None
    total = gone = 0
    fallbacks: list[str] = []
    kept: list[str] = []

    def report(done: int) -> None:
        context.report(done, count, f"layer {done}/{count}")

    with ShardWriter(out, len(checkpoint.weight_map)) as writer:
        for name in checkpoint.weight_map:
            if anatomy.placed(name) is None:
                writer.add(name, checkpoint.tensor(name))
        layers = _Layers(step, checkpoint, context, out, anatomy, threshold)
        for index, found in enumerate(ordered(layers.write, count, workers, report)):
            join(writer, out, index, found["names"])
            total, gone = total + found["weights"], gone + found["zeros"]
            fallbacks += found["fallbacks"]
            kept += found["kept"]
    checkpoint.write_others(out, checkpoint.config)
    context.warnings.append(HONEST)
    if fallbacks:
        context.warnings.append(
            f"{len(fallbacks)} linears were pruned by wanda instead, for their Gram could not be factorised "
            f"({fallbacks[0]}): give it more text"
        )
    return {
        "format": "hf",
        "dtype": "bfloat16",
        "method": step.method,
        "params": facts.params,
        "pattern": step.pattern,
        "zeros": gone,
        "sparsity": gone / total,
        "kept": [{"what": name, "why": "left alone (ignore)"} for name in kept],
    }


def _threshold(step: Prune, checkpoint: Checkpoint, anatomy: Anatomy) -> float:
    assert step.sparsity
    counted = sparse.Magnitudes()
    for layer in anatomy.layers:
        whole = checkpoint.tensors(layer.prefix)
        for linear in layer.linears:
            if not ignored(layer.prefix + linear.name, step.ignore):
                counted.add(linear.matrix(whole))
    return counted.threshold(step.sparsity)


class _Layers:
    """The layers of a checkpoint in which weights become zero."""

    def __init__(
        self,
        step: Prune,
        checkpoint: Checkpoint,
        context: Context,
        out: Path,
        anatomy: Anatomy,
        threshold: float | None,
    ) -> None:
        self.step, self.checkpoint, self.context, self.out = step, checkpoint, context, out
        self.anatomy, self.threshold = anatomy, threshold
        self._ready: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None

    def write(self, index: int) -> dict[str, Any]:
        """Writes the part of a layer. Returns the names of its tensors, counts, and notes."""
        with writing_part(self.out, index, len(self.checkpoint.weight_map)) as part:
            return {**self._prune(index, part.add), "names": part.names}

    def _prune(self, index: int, add: Callable[[str, torch.Tensor], None]) -> dict[str, Any]:
        """Writes the tensors of a layer. Returns counts and notes."""
        step, layer = self.step, self.anatomy.layers[index]
        prefix, device = layer.prefix, self.context.device
        grams, read_by = read_layer(self.context.grams, index, device) if self.context.grams else (None, {})
        told: dict[str, Any] = {"weights": 0, "zeros": 0, "fallbacks": [], "kept": []}
        whole = self.checkpoint.tensors(prefix)
        for linear in layer.linears:
            name = prefix + linear.name
            if ignored(name, step.ignore):
                told["kept"].append(name)
                continue
            weight = linear.matrix(whole)
            first = read_by.get(linear.name, "")
            if grams is None:
                found = self._smallest(weight.to(device))
            elif step.method == "wanda":
                found = self._wanda(weight.to(device), grams[first])
            else:
                try:
                    found = sparse.sparsegpt(
                        weight.to(device), self._prepared(first, grams), step.sparsity or 0.0, step.pattern
                    )
                except ArithmeticError:
                    told["fallbacks"].append(name)
                    found = self._wanda(weight.to(device), grams[first])
            weight.copy_(found)
            told["weights"] += weight.numel()
            told["zeros"] += int((weight == 0).sum())
        self._ready = None
        for name, tensor in whole.items():
            add(prefix + name, tensor)
        return told

    def _smallest(self, weight: torch.Tensor) -> torch.Tensor:
        if self.threshold is None:
            return sparse.magnitude(weight, self.step.sparsity or 0.0, self.step.pattern)
        return sparse.above(weight, self.threshold)

    def _wanda(self, weight: torch.Tensor, gram: Gram) -> torch.Tensor:
        return sparse.wanda(weight, gram.diagonal(), self.step.sparsity or 0.0, self.step.pattern)

    def _prepared(self, first: str, grams: Mapping[str, Gram]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what SparseGPT needs of an input; q, k and v read the same, and so do gate and up."""
        if self._ready is None or self._ready[0] != first:
            self._ready = (first, sparse.prepare(grams[first].matrix(), self.step.damp_percent or 0.01))
        return self._ready[1]
