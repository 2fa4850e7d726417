"""The `export` step for ExecuTorch: a program with its cache inside, and the files of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighten.errors import Failure
from lighten.export.executorch.linears import CodedEmbedding, CodedLinear, keep, rounded
from lighten.export.executorch.settings import ExecuTorch
from lighten.export.onnx.quiet import quiet
from lighten.export.onnx.weights import Quantized
from lighten.model import whole
from lighten.model.checkpoint import Checkpoint
from lighten.model.executorch_library import PROGRAM, load
from lighten.model.tokenizer_files import copy_words
from lighten.step import Context
from lighten.store.artifact import Artifact

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
    told = place(step, model, kept)
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
        also = ", and what stands for zero points and scales below zero to 8 bits" if told["weights_offset"] else ""
        context.warnings.append(f"the scales of the weights were rounded to bfloat16, as XNNPACK keeps them{also}")
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


def place(step: ExecuTorch, model: Any, kept: Quantized | None) -> dict[str, Any]:
    """Puts codes in the place of the weights of a model, those of a checkpoint if there is one.

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
    offset = 0
    for parent, name, path, linear in list(_linears(model)):
        is_head = linear is head
        if path in left and kept is not None:
            stored = keep(kept.codes(path), path)
            left.discard(path)
            offset += 0 if stored.offsets is None else linear.weight.numel()
        elif is_head and step.embedding == "float":
            continue
        elif is_head:
            stored = rounded(linear.weight.detach(), 8, None)
        elif kept is not None:
            continue
        else:
            stored = rounded(linear.weight.detach(), step.bits, step.group(linear.in_features, path))
        if not is_head:
            counts["weights_in_codes"] += linear.weight.numel()
        setattr(parent, name, CodedLinear(stored, linear.bias))
    if left:
        raise Failure(
            f"{min(left)} is quantized, but is no linear of {type(model).__name__}: set type: int8 or fp32, which "
            "unpack the weights, or export its source"
        )
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
        "embedding": step.embedding,
        **counts,
        "weights_in_floats": total - sum(counts.values()),
    }


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
