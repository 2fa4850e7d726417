"""The `quantize` step: the loop over layers that passes weights and Grams to a method."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from lighten.compress.layers import join
from lighten.compress.quantize.linears import Findings
from lighten.compress.quantize.quantized_layers import TENSORS_PER_LINEAR, Layers
from lighten.compress.quantize.settings import Quantize
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter
from lighten.plugins import found_at
from lighten.process.workers import crew, ordered
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Quantize, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the quantized model directory, one layer at a time.

    Raises:
        RequestError: the source is already quantized, or a budget cannot be met.
    """
    checkpoint = Checkpoint(source.path)
    if checkpoint.quantization:
        raise RequestError(f"this model is {source.format} already: quantize the one that it was made from")
    for module, _ in step.requires():
        importlib.import_module(module)  # once, not in every worker
    layers = Layers(step, checkpoint, context.grams, context.device, out)
    count, findings = len(layers), Findings()
    workers = crew(count, step.bytes_of_a_layer(checkpoint.facts), layers.device)
    allocated: dict[str, Any] = {}

    def report(done: int) -> None:
        context.report(done, count, f"layer {done}/{count}")

    with torch.inference_mode():
        if step.needs_sensitivity():
            layers.allocation, allocated = found_at(step.allocates)(step, layers, workers, context)
        with ShardWriter(out, TENSORS_PER_LINEAR * len(checkpoint.weight_map)) as writer:
            for name in checkpoint.weight_map:
                if name == anatomy.HEAD_WEIGHT and step.quantizes_head:
                    for stored_name, tensor in layers.head().items():
                        writer.add(stored_name, tensor)
                    findings.bits[anatomy.HEAD] = 8
                elif anatomy.placed(name) is None:
                    writer.add(name, checkpoint.tensor(name))
            for index, answer in enumerate(ordered(layers.write, count, workers, report)):
                join(writer, out, index, answer["names"])
                findings.add(Findings(**answer["findings"]))
    context.warnings += findings.warnings
    _write_config(step, checkpoint, findings, out)
    return {**_facts(step, checkpoint.facts, findings), **allocated}


def _facts(step: Quantize, facts: ModelFacts, findings: Findings) -> dict[str, Any]:
    """Returns the facts of the manifest: settings, what was left alone and why, and what was lost."""
    tied = "tied to the embedding" if facts.tied else "formats of linears keep the head, where errors cost most"
    kept = [
        {"what": "embedding", "why": "a lookup, not a product; no loader expects it quantized"},
        *([] if step.quantizes_head else [{"what": anatomy.HEAD, "why": tied}]),
        {"what": "norms", "why": "too small to matter"},
        *findings.kept,
    ]
    settings = {name: value for name, value in step.key_config().items() if name not in ("budget", "ignore")}
    worst = max(findings.errors, key=findings.errors.__getitem__) if findings.errors else None
    mean = sum(findings.errors.values()) / max(1, len(findings.errors))
    return {
        "format": step.format,
        **settings,
        "quantized_linears": len(findings.bits),
        "kept": kept,
        **({"rounded_to_nearest": findings.fallbacks} if findings.fallbacks else {}),
        **({"output_error": {"mean": mean, "worst": worst}} if findings.errors else {}),
    }


def _write_config(step: Quantize, checkpoint: Checkpoint, findings: Findings, out: Path) -> None:
    """Copies everything except the weights, and writes the configuration for loaders."""
    left = [*([] if step.quantizes_head else [anatomy.HEAD]), *(entry["what"] for entry in findings.kept)]
    quantization = step.config(findings.bits, left)
    checkpoint.write_others(out, {**checkpoint.config, "quantization_config": quantization})
    if step.config_file:
        (out / step.config_file).write_text(json.dumps(quantization, indent=2) + "\n")
