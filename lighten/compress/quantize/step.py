"""The `quantize` step: the loop over layers that passes weights and Grams to a method."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lighten.compress.layers import join
from lighten.compress.quantize.linears import Findings
from lighten.compress.quantize.quantized_layers import TENSORS_PER_LINEAR, Layers
from lighten.compress.quantize.settings import Quantize
from lighten.errors import Failure, RequestError
from lighten.facts import ModelFacts
from lighten.model.anatomy import HEAD, HEAD_WEIGHT, LAYERS
from lighten.model.blockwise import BlockwiseModel, check_known, doubts, known_anatomy, known_folds
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import Anatomy
from lighten.model.grams import ExpertTokens, expert_tokens, read_ids, read_targets
from lighten.model.shards import ShardWriter
from lighten.observe.streams import Streams
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
    anatomy = known_anatomy(checkpoint, context.grams, trust_remote_code=context.trust_remote_code)
    if step.quantizes_head and HEAD_WEIGHT not in checkpoint.weight_map:
        raise RequestError(f"this model stores no {HEAD_WEIGHT}: leave out head")
    check_known(checkpoint, anatomy)
    context.warnings += doubts(anatomy)
    if step.format == "bitsandbytes" and any(linear.inside for layer in anatomy.layers for linear in layer.linears):
        raise RequestError(
            f"{checkpoint.facts.architecture} has experts, and bitsandbytes opens none that are quantized: use gptq, "
            "awq or rtn"
        )
    trusted = context.trust_remote_code
    folds = known_folds(checkpoint, anatomy, trust_remote_code=trusted) if step.scales_inputs else {}
    layers = Layers(step, checkpoint, context.grams, context.device, out, anatomy, folds)
    count, findings = len(layers), Findings()
    workers = crew(count, step.bytes_of_a_layer(checkpoint.facts), layers.device)
    allocated: dict[str, Any] = {}

    def report(done: int) -> None:
        context.report(done, count, f"layer {done}/{count}")

    with torch.inference_mode():
        if step.needs_sensitivity():
            layers.allocation, allocated = found_at(step.allocates)(step, layers, workers, context)
        linears = sum(linear.stored is not None for layer in anatomy.layers for linear in layer.linears)
        with ShardWriter(out, TENSORS_PER_LINEAR * (len(checkpoint.weight_map) + linears)) as writer:
            for name in checkpoint.weight_map:
                if name == HEAD_WEIGHT and step.quantizes_head:
                    for stored_name, tensor in layers.head().items():
                        writer.add(stored_name, tensor)
                    findings.bits[HEAD] = 8
                elif anatomy.placed(name) is None:
                    writer.add(name, checkpoint.tensor(name))
            written: Iterable[tuple[int, Any]] = enumerate(ordered(layers.write, count, workers, report))
            streams = None
            if step.propagates and context.grams:
                streams = Streams(layers, BlockwiseModel(checkpoint, context.device, trust_remote_code=trusted))
                written = streams.walk(read_ids(context.grams), read_targets(context.grams), context)
            for index, answer in written:
                join(writer, out, index, answer["names"])
                findings.add(Findings(**answer["findings"]))
            allocated |= streams.facts if streams else {}
    _check_covered(anatomy, findings)
    for layer in anatomy.layers:
        findings.kept += [{"what": name.removesuffix(".weight"), "why": why} for name, why in layer.kept.items()]
    context.warnings += findings.warnings
    _write_config(step, checkpoint, anatomy, findings, out)
    seen = streams.experts if streams else expert_tokens(context.grams) if context.grams else None
    return {**_facts(step, checkpoint.facts, anatomy, findings), **_of_experts(seen, context), **allocated}


def _of_experts(seen: ExpertTokens | None, context: Context) -> dict[str, Any]:
    """Returns the facts about the tokens that experts saw, and warns of those that saw too few."""
    if seen is None:
        return {}
    if seen.starved:
        context.warnings.append(
            f"{seen.starved} of {seen.experts} experts saw fewer tokens than their inputs are wide (the fewest: "
            f"{seen.fewest}): their Grams are drawn towards that of all tokens; give it more text"
        )
    return {"experts": seen.as_json()}


def _check_covered(anatomy: Anatomy, findings: Findings) -> None:
    """Raises Failure if a linear was neither quantized nor left alone for a reason."""
    settled = {*findings.bits, *(each["what"] for each in findings.kept)}
    names = (layer.prefix + linear.name for layer in anatomy.layers for linear in layer.linears)
    if left := [name for name in names if name not in settled]:
        raise Failure(f"{len(left)} linears were not quantized, {left[0]} for one: the calibration never ran them")


def _facts(step: Quantize, facts: ModelFacts, anatomy: Anatomy, findings: Findings) -> dict[str, Any]:
    """Returns the facts of the manifest: settings, what was left alone and why, and what was lost."""
    tied = "tied to the embedding" if facts.tied else "formats of linears keep the head, where errors cost most"
    kept = [
        {"what": "embedding", "why": "a lookup, not a product; no loader expects it quantized"},
        *([] if step.quantizes_head else [{"what": HEAD, "why": tied}]),
        {"what": "norms", "why": "too small to matter"},
        *({"what": name, "why": "no part of the language model: carried over as it is"} for name in anatomy.others),
        *findings.kept,
    ]
    settings = {name: value for name, value in step.key_config().items() if name not in ("budget", "ignore")}
    worst = max(findings.errors, key=findings.errors.__getitem__) if findings.errors else None
    mean = sum(findings.errors.values()) / max(1, len(findings.errors))
    return {
        "format": step.format,
        **settings,
        "quantized_linears": len(findings.bits),
        "coverage": round(anatomy.weights_of(findings.bits) / anatomy.weights, 4),
        "kept": kept,
        **({"rounded_to_nearest": findings.fallbacks} if findings.fallbacks else {}),
        **({"output_error": {"mean": mean, "worst": worst}} if findings.errors else {}),
    }


def _write_config(step: Quantize, checkpoint: Checkpoint, anatomy: Anatomy, findings: Findings, out: Path) -> None:
    """Copies everything except the weights, and writes the configuration for loaders."""
    left = [*([] if step.quantizes_head else [HEAD]), *(entry["what"] for entry in findings.kept)]
    left = [name for stored in left for name in anatomy.names(stored)] + anatomy.linears_of_others
    bits = {name: bits for stored, bits in findings.bits.items() for name in anatomy.names(stored)}
    quantization = {**step.config(bits, left), **_where(step, anatomy, findings)}
    checkpoint.write_others(out, {**checkpoint.config, "quantization_config": quantization})
    if step.config_file:
        (out / step.config_file).write_text(json.dumps(quantization, indent=2) + "\n")


def _where(step: Quantize, anatomy: Anatomy, findings: Findings) -> dict[str, Any]:
    """Returns what a `gptq` config says of the places of linears, if loaders cannot guess it.

    Loaders take every linear of the layers for quantized, and know a few names of the list of layers. `dynamic` is read
    by GPTQModel and vLLM, the other two by optimum, which transformers loads with.
    """
    if step.format != "gptq":
        return {}
    lists = {layer.module.rpartition(".")[0] for layer in anatomy.layers}
    placed = [each["what"] for each in findings.kept if anatomy.placed(each["what"] + ".")]
    kept = {re.sub(r"\.\d+\.", r".N.", name) for stored in placed for name in anatomy.names(stored)}
    if lists == {LAYERS[:-1]} and not kept and not anatomy.others:
        return {}
    dynamic: dict[str, Any] = {"-:" + re.escape(name).replace(r"\.N\.", r"\.\d+\.") + "$": {} for name in sorted(kept)}
    dynamic |= {"-:" + re.escape(name) + r"\.": {} for name in sorted(anatomy.others)}
    if any(linear.inside for layer in anatomy.layers for linear in layer.linears):
        return {"dynamic": dynamic} if dynamic else {}  # optimum takes no experts; the others ask for no list
    names = {
        linear.module
        for layer in anatomy.layers
        for linear in layer.linears
        if layer.prefix + linear.name in findings.bits
    }
    return {
        "block_name_to_quantize": min(lists),
        "modules_in_block_to_quantize": [sorted(names)],
        **({"dynamic": dynamic} if dynamic else {}),
    }
