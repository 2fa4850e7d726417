"""The `quantize` step: the loop over layers that hands (W, Gram) to a method."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lighten.compress.layers import write_layers
from lighten.compress.quantize import formats
from lighten.compress.quantize.bits import allocate
from lighten.compress.quantize.layer import HEAD, TENSORS_PER_LINEAR, Layers, Told
from lighten.compress.quantize.settings import Quantize
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter
from lighten.model.stream import LAYERS
from lighten.process.workers import crew
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Quantize, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the quantized model directory, one layer at a time.

    Raises:
        RequestError: the source is quantized already, or a budget cannot be met.
    """
    checkpoint = Checkpoint(source.path)
    if checkpoint.quantization:
        raise RequestError(f"this model is {source.format} already: quantize the one that it was made from")
    with torch.inference_mode():
        return _Run(Layers(step, checkpoint, context.grams, context.device), out, context, Told()).run()


@dataclass
class _Run:
    """One quantization under way."""

    layers: Layers
    out: Path
    context: Context
    told: Told
    allocated: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Writes everything and returns the facts."""
        layers, out, count = self.layers, self.out, len(self.layers)
        step, checkpoint = layers.step, layers.checkpoint
        for module, _ in step.requires():
            importlib.import_module(module)  # once, not in every worker
        workers = crew(count, step.bytes_of_a_layer(checkpoint.facts), layers.device)
        if step.budget:
            layers.allocation, self.allocated = allocate(layers, workers, self.context)
        with ShardWriter(out, TENSORS_PER_LINEAR * len(checkpoint.weight_map)) as writer:
            for name in checkpoint.weight_map:
                if name == HEAD and step.head == 8:
                    for stored_name, tensor in layers.head().items():
                        writer.add(stored_name, tensor)
                    self.told.bits[HEAD.removesuffix(".weight")] = 8
                elif not name.startswith(LAYERS):
                    writer.add(name, checkpoint.tensor(name))
            tensors = TENSORS_PER_LINEAR * len(checkpoint.tensors(f"{LAYERS}0."))
            for told in write_layers(writer, out, count, workers, layers.quantize, tensors, self._report):
                self.told.add(Told(**told))
        self.context.warnings += self.told.warnings
        self._write_config()
        return self._facts()

    def _report(self, done: int) -> None:
        self.context.report(done, len(self.layers), f"layer {done}/{len(self.layers)}")

    def _facts(self) -> dict[str, Any]:
        step, facts = self.layers.step, self.layers.checkpoint.facts
        tied = "tied to the embedding" if facts.tied else "formats of linears keep the head, where errors cost most"
        kept = [
            {"what": "embedding", "why": "a lookup, not a product; no loader expects it quantized"},
            *([] if step.head == 8 else [{"what": "lm_head", "why": tied}]),
            {"what": "norms", "why": "too small to matter"},
            *self.told.kept,
        ]
        settings = {name: value for name, value in step.key_config().items() if name not in ("budget", "ignore")}
        worst = max(self.told.errors, key=self.told.errors.__getitem__) if self.told.errors else None
        mean = sum(self.told.errors.values()) / max(1, len(self.told.errors))
        return {
            "format": step.format,
            **settings,
            "quantized_linears": len(self.told.bits),
            "kept": kept,
            **({"rounded_to_nearest": self.told.fallbacks} if self.told.fallbacks else {}),
            **({"output_error": {"mean": mean, "worst": worst}} if self.told.errors else {}),
            **self.allocated,
        }

    def _write_config(self) -> None:
        """Copies everything but the weights, and tells the loaders what they will find."""
        step, checkpoint = self.layers.step, self.layers.checkpoint
        quantization = self._quantization()
        checkpoint.write_others(self.out, {**checkpoint.config, "quantization_config": quantization})
        if step.format == "gptq":
            (self.out / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")

    def _quantization(self) -> dict[str, Any]:

        step = self.layers.step
        left = [*([] if step.head == 8 else ["lm_head"]), *(entry["what"] for entry in self.told.kept)]
        if step.format == "bitsandbytes":
            return formats.bnb_config(step.method, bool(step.double_quant), left)
        if step.method == "fp8":
            groups = [(formats.floats(), ["Linear"])]
            return formats.compressed_config(groups, formats.per_token("float"), "float-quantized", left)
        size = -1 if step.group_size in (None, "tensor") else int(step.group_size)
        if step.method in ("w8a8", "int8-dynamic"):
            groups = [(formats.integers(8, -1, True), ["Linear"])]
            return formats.compressed_config(groups, formats.per_token("int"), "int-quantized", left)
        if step.format == "awq":
            return formats.awq_config(4, size, left)
        if step.format == "gptq":
            assert step.bits
            return formats.gptq_config(step.bits, size, bool(step.sym), bool(step.desc_act), step.damp_percent)
        widths = sorted(set(self.told.bits.values()))
        groups = [
            (formats.integers(bits, size, bool(step.sym)), [name for name, b in self.told.bits.items() if b == bits])
            for bits in widths
        ]
        if len(groups) == 1:
            groups = [(groups[0][0], ["Linear"])]
        return formats.compressed_config(groups, None, "pack-quantized", left)
