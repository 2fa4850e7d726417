"""The `export` step for ONNX: a graph by the genai builder, or a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.export.onnx import builder, tensorrt
from lighten.export.onnx import genai as onnx
from lighten.export.onnx import plain as onnx_plain
from lighten.export.onnx.settings import Onnx
from lighten.facts import ModelFacts
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Onnx, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the directory and returns its facts.

    Raises:
        RequestError: the source has no ONNX form.
    """
    facts = Checkpoint(source.path).facts
    step.check(facts)
    step.check_source(source.format, facts)
    told = _write(step, source, out, facts, context)
    return {**told, "tensorrt": tensorrt.facts(sorted(out.glob("*.onnx")))}


def _write(step: Onnx, source: Artifact, out: Path, facts: ModelFacts, context: Context) -> dict[str, Any]:
    if step.resolved_graph(facts) == "plain":
        if step.graph is None and (reason := builder.WRONG.get(facts.architecture)):
            context.warnings.append(f"a plain graph, because that of onnxruntime-genai is another model: {reason}")
        rounded = step.embedding != "float"
        return onnx_plain.write(source.path, out, facts, step.resolved_precision(facts), context, embeddings=rounded)

    return onnx.write(source.path, out, step, context)
