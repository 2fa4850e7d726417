"""Models as graphs of standard ONNX operators, by the exporter of torch that is based on `torch.export`.

`traced` has what is traced, and so which files there are.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.errors import Failure, RequestError, missing_extra
from lighten.export.onnx.eight_bits import round_weights
from lighten.export.onnx.quiet import quiet
from lighten.export.onnx.traced import Traced, traced, untraced
from lighten.facts import ModelFacts
from lighten.model.checkpoint import Checkpoint
from lighten.model.files import read_json
from lighten.step import Context
from lighten.store.store import write_json

OPSET = 20
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}
"""Largest allowed difference from torch, relative to the largest output."""


def write(
    source: Path, out: Path, facts: ModelFacts, precision: str, context: Context, *, embeddings: bool = True
) -> dict[str, Any]:
    """Writes the graphs of a model into the existing directory `out`, and returns facts.

    In a graph of int8, `embeddings` are rounded too.

    Raises:
        RequestError: a package is missing, or transformers has no class for the model.
        Failure: torch cannot trace the model, or a graph computes something else.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_extra("onnx", str(error.name), "ONNX export") from error
    dtype = torch.float16 if precision == "fp16" else torch.float32
    method = (Checkpoint(source).quantization or {}).get("quant_method")
    model = _unpacked(source, dtype, context) if method else _open(source, facts, dtype, context.trust_remote_code)
    if method:
        context.warnings.append(f"the weights of a {method} checkpoint were unpacked: its rounding is in the graph")
    parts = traced(model, facts.family)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        for number, each in enumerate(parts):
            context.report(number, len(parts), f"tracing {each.file}")
            path = Path(folder) / each.file
            _export(each, path)
            onnx.checker.check_model(path)
            _compare(each, path, TOLERANCE[precision if precision == "fp16" else "fp32"])
            if precision == "int8":
                round_weights(path, embeddings=embeddings)
            _only_standard(path)
            for file in sorted(Path(folder).glob(f"{path.name}*")):
                shutil.move(file, out / file.name)
        context.report(len(parts), len(parts), "")
    _copy_others(source, out)
    if method:
        config = read_json(out / "config.json")
        config.pop("quantization_config", None)
        write_json(out / "config.json", config)
        (out / "quantize_config.json").unlink(missing_ok=True)
    return {
        "format": "onnx",
        **({"unpacked": method} if method else {}),
        "graph": "plain",
        "precision": precision,
        "opset": OPSET,
        "files": [each.file for each in parts],
        **(_told(embeddings) if precision == "int8" else {}),
    }


def _told(embeddings: bool) -> dict[str, str]:
    told = "rounded to 8 bits for each output, inputs as they come by the largest number of each position"
    return {"weights": told, "embeddings": "rounded to 8 bits for each row" if embeddings else "float32"}


def _open(source: Path, facts: ModelFacts, dtype: torch.dtype, trusted: bool) -> Any:
    import transformers

    from lighten.model.loading import from_pretrained

    name = facts.architecture
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        found = None  # the name is the file's: no other class is called
    if found is None and facts.family == "causal":
        found = transformers.AutoModelForCausalLM
    if found is None:
        raise RequestError(f"transformers has no class {name}: name one of its own under architectures in config.json")
    # experts as one product for all tokens: ONNX has no grouped product, and no loop over those that were chosen
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    if found is transformers.AutoModelForCausalLM:
        options["trust_remote_code"] = trusted
    with quiet():
        model = from_pretrained(found, source, dtype=dtype, **options)
    return model.eval()


def _unpacked(source: Path, dtype: torch.dtype, context: Context) -> Any:
    """Returns the model of a quantized directory with plain weights, experts as one product for all tokens."""
    from lighten.model import whole

    with quiet():
        model = whole.load(source, dtype, trust_remote_code=context.trust_remote_code)
        model.set_attn_implementation("eager")
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")
    return model


def _export(part: Traced, path: Path) -> None:
    """Writes a graph, weights beside it, without the places in source code where its nodes come from."""
    import onnx_ir as ir

    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                part.module.eval(),
                part.inputs,
                dynamo=True,
                dynamic_shapes=part.axes,
                input_names=part.entering,
                output_names=part.leaving,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch's own errors share no base class
        raise Failure(untraced(part.module.model, _reason(error))) from error
    assert program is not None
    model = program.model
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "model"
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=256)


def _reason(error: BaseException) -> str:
    """Returns what stopped torch. The exporter puts advice for those who write models around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _feed(part: Traced) -> dict[str, np.ndarray[Any, Any]]:
    flat = _flat(part.inputs)
    return {name: value.numpy() for name, value in zip(part.entering, flat, strict=True)}


def _flat(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [each for value in values for each in _flat(value)]


def _compare(part: Traced, path: Path, tolerance: float) -> None:
    """Runs a graph once on the inputs it was part with.

    Raises:
        Failure: its outputs are not torch's.
    """
    with torch.no_grad():
        expected = _flat(part.module(*part.inputs))
    session = open_session(path)
    taken = {each.name for each in session.get_inputs()}
    found = session.run(part.leaving, {name: value for name, value in _feed(part).items() if name in taken})
    for name, wanted, got in zip(part.leaving, expected, found, strict=True):
        wide = wanted.float().numpy()
        gap = float(np.abs(wide - got.astype(np.float32)).max() / max(np.abs(wide).max(), 1e-6))
        if not gap <= tolerance:
            raise Failure(
                f"{part.file} gives another {name} than torch ({gap:.1e} off): it cannot be exported this way"
            )


def open_session(path: Path) -> Any:
    """Returns an onnxruntime session on the CPU that reports only errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _only_standard(path: Path) -> None:
    """Raises Failure if a graph has an operator that is not ONNX's own."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    if others := sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")}):
        raise Failure(f"{path.name} needs operators beyond ONNX's own: {', '.join(others)}")
    onnx.checker.check_model(path)


def _copy_others(source: Path, out: Path) -> None:
    """Copies config, tokenizer and chat templates."""
    from lighten.model.pooling import copy_pooling
    from lighten.model.tokenizer_files import copy_words

    copy_words(source, out)
    copy_pooling(source, out)
