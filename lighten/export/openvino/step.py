"""The `export` step for OpenVINO: a stateful graph, its weights, and the files of the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighten.errors import Failure, RequestError, missing_extra
from lighten.export.onnx.quiet import quiet
from lighten.export.onnx.weights import Quantized
from lighten.export.openvino import words
from lighten.export.openvino.convert import convert
from lighten.export.openvino.settings import FLOATS, OpenVino
from lighten.export.openvino.surgery import Surgery
from lighten.export.openvino.weights import keep, rounded
from lighten.model import tokenizer_files, whole
from lighten.model.checkpoint import Checkpoint
from lighten.model.openvino_library import load
from lighten.step import Context
from lighten.store.artifact import Artifact

GRAPH = "openvino_model.xml"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
"""Type of keys and values that the file asks its runtime for. Without a word, plugins round them to 8 bits."""


def run(step: OpenVino, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the directory and returns its facts.

    Raises:
        RequestError: a package is missing, or a setting does not fit the source.
        Failure: the model cannot be made a graph, or its codes have no place in it.
    """
    openvino = load("OpenVINO export")
    try:
        import openvino_tokenizers  # noqa: F401
    except ImportError as error:
        raise missing_extra("openvino", str(error.name), "OpenVINO export") from error
    checkpoint = Checkpoint(source.path)
    step.check(checkpoint.facts)
    step.check_source(source.format, checkpoint.facts)
    kept = Quantized(checkpoint) if step.keeps(source.format) else None
    if kept is not None:
        _check_width(step, kept)
    context.report(0, 4, "opening")
    model = _open(step, checkpoint, kept, context)
    context.report(1, 4, "tracing")
    graph = convert(model)
    context.report(2, 4, "weights")
    told = place(step, Surgery(graph, model), model, kept, context.warnings)
    _say_cache(step, graph)
    context.report(3, 4, "writing")
    openvino.save_model(graph, out / GRAPH, compress_to_fp16=False)
    _copy_others(checkpoint, model, out)
    told |= words.write(source.path, out, context.warnings)
    context.report(4, 4, "")
    return {"format": "openvino", "type": step.type or (kept.method if kept else "int4"), **told}


def _check_width(step: OpenVino, kept: Quantized) -> None:
    """Raises RequestError if the codes of a checkpoint are not those of the type that was asked for."""
    bits = kept.codes(kept.names[0]).bits if kept.names else 4
    if step.type is not None and (bits > 4) != (step.type == "int8"):
        raise RequestError(
            f"the weights of a {kept.method} checkpoint are kept as they are, in {bits} bits: leave out `type`, or set "
            f"{', '.join(FLOATS)} to unpack them"
        )


def _open(step: OpenVino, checkpoint: Checkpoint, kept: Quantized | None, context: Context) -> Any:
    """Returns the model in the type of its floating-point weights in the graph."""
    from transformers import AutoModelForCausalLM

    from lighten.model.loading import from_pretrained

    trusted = context.trust_remote_code
    dtype = TYPES[step.type] if step.type in TYPES else _stored_type(checkpoint, kept)
    with quiet():
        if checkpoint.quantization:
            if kept is None:
                method = checkpoint.quantization.get("quant_method")
                context.warnings.append(f"the weights of a {method} checkpoint were unpacked: its rounding is in them")
            model = whole.load(checkpoint.path, dtype, trust_remote_code=trusted)
        else:
            model = from_pretrained(AutoModelForCausalLM, checkpoint.path, dtype=dtype, trust_remote_code=trusted)
    return model.eval()


def _stored_type(checkpoint: Checkpoint, kept: Quantized | None) -> torch.dtype:
    """Returns the type in which all plain weights are stored; float32 if there are several."""
    inside = tuple(f"{name}." for name in kept.names) if kept else ()
    names = [name for name in checkpoint.weight_map if not name.startswith(inside)] if inside else checkpoint.weight_map
    types = {checkpoint.tensor(name).dtype for name in names}
    return types.pop() if len(types) == 1 and types <= {torch.float16, torch.bfloat16} else torch.float32


def place(
    step: OpenVino, surgery: Surgery, model: nn.Module, kept: Quantized | None, warnings: list[str]
) -> dict[str, Any]:
    """Puts codes into the graph of a model, those of a checkpoint if there is one; nothing for types of floats.

    Returns:
        Facts: how many weights have codes, and how many stayed floats.

    Raises:
        RequestError: a pattern of `ignore` names no linear.
        Failure: codes have no place in the graph.
    """
    if step.type in TYPES:
        return {}
    left = set(kept.names if kept else ())
    ignored = _ignored(step.ignore, [name for names in surgery.names.values() for name in names])
    counts = {"codes": 0, "embedding": 0}
    stayed = []
    for where, names, operators in list(surgery.weights()):
        weight = _weight(model, names[0])
        linears = [name for name in names if name in left]
        if linears and kept is not None:
            surgery.replace(where, keep(kept.codes(linears[0]), linears[0]))
            left -= set(linears)
            counts["codes"] += weight.numel()
        elif "Gather" in operators or _is_head(model, names):
            if step.embedding == "int8":
                surgery.replace(where, rounded(weight.detach(), 8, None, zero_point=step.zero_point))
                counts["embedding"] += weight.numel()
            else:
                stayed.append(names[0])
        elif kept is not None or ignored & set(names):
            stayed.append(names[0])
        else:
            bits, size = (4, step.group_size) if step.type != "int8" else (8, None)
            surgery.replace(where, rounded(weight.detach(), bits, size, zero_point=step.zero_point))
            counts["codes"] += weight.numel()
    if left:
        raise Failure(
            f"{min(left)} is quantized, but the graph has no place for its codes: set type: fp16, which unpacks the "
            "weights, or export its source"
        )
    surgery.graph.validate_nodes_and_infer_types()
    return _told(step, kept, counts, stayed, model, warnings)


def _told(
    step: OpenVino,
    kept: Quantized | None,
    counts: dict[str, int],
    stayed: list[str],
    model: nn.Module,
    warnings: list[str],
) -> dict[str, Any]:
    large = {each.data_ptr(): each.numel() for each in model.parameters() if each.dim() > 1}
    floats = sum(large.values()) - sum(counts.values())
    unforeseen = floats - sum(_weight(model, name).numel() for name in stayed)
    if unforeseen > 0:
        warnings.append(
            f"{unforeseen / sum(large.values()):.0%} of the weights are in products that codes have no place in, such "
            "as experts in one tensor: they stay floats"
        )
    return {
        "weights": f"kept from {kept.method}" if kept else f"rounded to {step.type or 'int4'}",
        **({} if kept or step.type == "int8" else {"group_size": step.group_size}),
        "embedding": step.embedding,
        "weights_in_codes": counts["codes"],
        "weights_of_embedding_in_codes": counts["embedding"],
        "weights_in_floats": floats,
    }


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    found: torch.Tensor = model.get_parameter(f"{name}.weight")
    return found


def _is_head(model: Any, names: Sequence[str]) -> bool:
    head = model.get_output_embeddings()
    return any(model.get_submodule(name) is head for name in names)


def _ignored(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Returns the linears that patterns name.

    Raises:
        RequestError: a pattern names none.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            matches = {name for name in names if re.fullmatch(pattern[3:], name)}
        else:
            matches = {name for name in names if fnmatch(name, pattern)}
        if not matches:
            raise RequestError(f"ignore: no linear is called {pattern!r}; names are such as {names[-1]}")
        found |= matches
    return found


def _say_cache(step: OpenVino, graph: Any) -> None:
    """Writes into the graph what its runtime is to keep keys and values in.

    A graph of floats has them in its own type. For one of codes the runtime chooses. The arithmetic is left to it too.
    """
    del graph.get_rt_info()["runtime_options"]
    if step.type in CACHES:
        graph.set_rt_info(CACHES[step.type], ["runtime_options", "KV_CACHE_PRECISION"])


def _copy_others(checkpoint: Checkpoint, model: Any, out: Path) -> None:
    """Copies tokenizer, chat templates and licence, and writes the configs."""
    from transformers import GenerationConfig

    tokenizer_files.copy_words(checkpoint.path, out, leave=("config.json", "quantize_config.json"))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (out / "generation_config.json").is_file():
        GenerationConfig.from_model_config(model.config).save_pretrained(out)
