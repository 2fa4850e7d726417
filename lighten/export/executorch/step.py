"""The `export` step for ExecuTorch: a program with its cache inside, and the files of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighten.errors import Failure
from lighten.export.executorch import head as heads
from lighten.export.executorch.inputs import LENGTH, SAMPLES, Asked, Found, choose, even
from lighten.export.executorch.linears import CodedEmbedding, CodedLinear, Stored, compensated, keep, rounded
from lighten.export.executorch.settings import ExecuTorch
from lighten.export.onnx.quiet import quiet
from lighten.export.onnx.weights import Quantized
from lighten.export.text import built_in
from lighten.model import whole
from lighten.model.checkpoint import Checkpoint
from lighten.model.executorch_library import PROGRAM, load
from lighten.model.tokenizer_files import copy_words
from lighten.step import Context
from lighten.store.artifact import Artifact

_WITHOUT = "inputs that are loud were not rounded apart"
_ROWS = 4096
"""Rows of an embedding that are computed together."""


def run(step: ExecuTorch, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the directory and returns its facts.

    Raises:
        RequestError: executorch is missing, or a setting does not fit the source.
        Failure: the model has no form in ExecuTorch, or its codes have none.
    """
    load("export to ExecuTorch")
    from lighten.export.executorch.cached import ATTENTION
    from lighten.export.executorch.program import build

    checkpoint = Checkpoint(source.path)
    facts = checkpoint.facts
    step.check(facts)
    step.check_source(source.format, facts)
    stages = iter(range(1, 5))
    context.report(0, 4, "opening")
    kept = Quantized(checkpoint) if step.keeps(source.format) else None
    model = _open(step, checkpoint, kept, context)
    shape = heads.SAMPLES, LENGTH
    ids = built_in(source.path, facts, shape, context, _WITHOUT) if step.rounded else None
    told = place(step, model, kept, ids)
    if "inputs_cost_unknown" in told:
        context.warnings.append(
            "all linears round their inputs in two parts, which is slow: the model has no gradient that tells where it "
            f"is worth it ({told['inputs_cost_unknown']})"
        )
    model.set_attn_implementation(ATTENTION)
    positions = step.positions(facts)
    bits = step.bits if kept is None else 4
    told |= build(
        model, positions, bits, _ends(model), out / PROGRAM, lambda stage: context.report(next(stages), 4, stage)
    )
    copy_words(checkpoint.path, out, leave=("config.json", "quantize_config.json"))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    context.report(4, 4, "")
    if kept is not None:
        context.warnings.append("the scales of the weights were rounded to bfloat16, as XNNPACK keeps them")
    return {
        "format": "executorch",
        "type": step.type or (kept.method if kept else "int4"),
        "context": positions,
        **told,
    }


def _open(step: ExecuTorch, checkpoint: Checkpoint, kept: Quantized | None, context: Context) -> Any:
    """Returns the model in float32."""
    from transformers import AutoModelForCausalLM

    from lighten.model.loading import from_pretrained

    trusted = context.trust_remote_code
    with quiet():
        if not checkpoint.quantization:
            return from_pretrained(
                AutoModelForCausalLM, checkpoint.path, dtype=torch.float32, trust_remote_code=trusted
            ).eval()
        if kept is None:
            method = checkpoint.quantization.get("quant_method")
            context.warnings.append(f"the weights of a {method} checkpoint were unpacked: its rounding is in them")
        return whole.load(checkpoint.path, torch.float32, trust_remote_code=trusted).eval()


def place(step: ExecuTorch, model: Any, kept: Quantized | None, ids: torch.Tensor | None = None) -> dict[str, Any]:
    """Puts codes in the place of the weights of a model, those of a checkpoint if there is one.

    Args:
        step: the settings.
        model: a causal model in float32.
        kept: the codes of a checkpoint.
        ids: tokens on which it is seen what rounding inputs costs, `[samples, length]`; None if there are none.

    Returns:
        Facts: how many weights have codes, and how many stayed floats.

    Raises:
        Failure: codes have no place, or no form in ExecuTorch.
    """
    if kept is None and step.bits == 32:
        return {}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    left = set(kept.names if kept else ())
    total = sum({each.data_ptr(): each.numel() for each in model.parameters() if each.dim() > 1}.values())
    counts = {"weights_in_codes": 0, "weights_of_embedding_in_codes": 0}
    places: dict[nn.Linear, tuple[nn.Module, str]] = {}
    weights: dict[nn.Linear, Stored] = {}
    told: dict[str, str] = {}
    evened = {} if ids is None else even(model, ids[:SAMPLES], _eights(step, model, kept))
    for parent, name, path, linear in list(_linears(model)):
        is_head = linear is head
        if path in left and kept is not None:
            weights[linear] = keep(kept.codes(path), path)
            left.discard(path)
        elif (is_head and step.embedding == "float") or (kept is not None and not is_head):
            continue
        else:
            if is_head:
                weights[linear], told["head_rounding"] = _head(model, linear, ids)
            else:
                group = step.group(linear.in_features, path)
                weights[linear] = rounded(linear.weight, step.bits, group, evened.get(linear))
        places[linear] = parent, name
        counts["weights_in_codes"] += 0 if is_head else linear.weight.numel()
    if left:
        raise Failure(
            f"{min(left)} is quantized, but is no linear of {type(model).__name__}: set type: int8 or fp32, which "
            "unpack the weights, or export its source"
        )
    offset = sum(linear.weight.numel() for linear, each in weights.items() if each.offsets is not None)
    asked = {linear: Asked(each.bits, each.size, each.order, each.even) for linear, each in weights.items()}
    found = None if ids is None else choose(model, ids[:SAMPLES], asked)
    for linear, stored in weights.items():
        parent, name = places[linear]
        setattr(parent, name, CodedLinear(stored, linear.bias, found.ways[linear] if found else None))
    tied = head is not None and head.weight.data_ptr() == table.weight.data_ptr()
    if step.embedding == "int8":
        counts["weights_of_embedding_in_codes"] += table.weight.numel()
        if head is not None and not tied:
            counts["weights_of_embedding_in_codes"] += head.weight.numel()
        model.set_input_embeddings(CodedEmbedding(rounded(_rows(table), 8, None)))
    return {
        "weights": f"kept from {kept.method}" if kept else f"rounded to {step.type or 'int4'}",
        **({"group_size": step.group_size} if kept is None and step.bits == 4 else {}),
        **({"weights_offset": offset} if kept else {}),
        **told,
        **_told(found),
        "embedding": step.embedding,
        **counts,
        "weights_in_floats": total - sum(counts.values()),
    }


def _head(model: Any, head: nn.Linear, ids: torch.Tensor | None) -> tuple[Stored, str]:
    """Returns the head in 8 bits, rounded against the inputs that it has on a text if there is one, and how it was.

    Args:
        model: a causal model.
        head: its head.
        ids: tokens of the text, `[samples, length]`; None if there are none.
    """
    if ids is None:
        return rounded(head.weight, 8, None), "nearest, as no text was read"
    inputs = heads.inputs_of(model, ids, head)
    divided = heads.evened(inputs, head)
    try:
        return compensated(head.weight, inputs.T @ inputs, divided), "gptq"
    except ArithmeticError as error:
        return rounded(head.weight, 8, None, divided), f"nearest, as {error}"


def _told(found: Found | None) -> dict[str, Any]:
    """Returns what is known of the rounding of inputs, in nats per token."""
    if found is None:
        return {"linears_in_two_parts": 0}
    parts = {"linears_in_two_parts": sum(way.parts > 1 for way in found.ways.values())}
    if found.error:
        return {**parts, "inputs_cost_unknown": found.error}
    return {**parts, "inputs_cost": round(found.cost, 6), "inputs_cost_together": round(found.together, 6)}


def _eights(step: ExecuTorch, model: Any, kept: Quantized | None) -> list[nn.Linear]:
    """Returns the linears beside the head that are rounded here to 8 bits, with a scale for each output."""
    if kept is not None or step.bits != 8:
        return []
    head = model.get_output_embeddings()
    return [linear for *_, linear in _linears(model) if linear is not head]


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """Yields the parent, the name in it and the whole name of each linear."""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                yield module, name, f"{path}.{name}" if path else name, child


@torch.no_grad()
def _rows(table: Any) -> torch.Tensor:
    """Returns what an embedding gives for every id, `[vocab, width]`: some multiply their rows by a number."""
    ids = torch.arange(len(table.weight))
    return torch.cat([table(ids[first : first + _ROWS]) for first in range(0, len(ids), _ROWS)])


def _ends(model: Any) -> tuple[int, list[int]]:
    """Returns the id that begins a text (0 if the model names none), and those that end one."""
    told = model.generation_config or model.config
    bos, eos = getattr(told, "bos_token_id", None), getattr(told, "eos_token_id", None)
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return (bos if isinstance(bos, int) else 0), ends or [0]
