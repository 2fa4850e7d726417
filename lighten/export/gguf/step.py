"""The `export` step for GGUF: one file, or several parts of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lighten.errors import RequestError
from lighten.export.gguf import quantize as gguf_quantize
from lighten.export.gguf.allocate import Prices, fit
from lighten.export.gguf.ollama import modelfile
from lighten.export.gguf.quantize import Importance
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.split import split
from lighten.export.gguf.write import Draft
from lighten.export.step import about
from lighten.model.checkpoint import Checkpoint
from lighten.model.gguf.towers import model_of
from lighten.model.gguf_header import MODELFILE
from lighten.model.sensitivity import Sensitivity
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Gguf, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the file and returns its facts.

    Raises:
        RequestError: the source is not a plain Hugging Face directory.
    """
    step.check_source(source.format, Checkpoint(source.path).facts)
    file = out / f"model-{step.type}.gguf"
    origin = {**about(source), "lighten.step": json.dumps(step.key_config(), sort_keys=True)}
    if context.key:
        origin["lighten.key"] = context.key
    if source.format != "hf":
        context.warnings.append(f"the weights come from a {source.format} checkpoint: its rounding is in the file too")
    weights = None
    if step.needs_sweep():
        if context.grams is None or (step.budget and context.sensitivity is None):
            asked = "a budget" if step.budget else f"rounding: {step.rounding}" if step.rounding else "imatrix: true"
            raise RequestError(f"{asked} needs a calibration set: name one under calibration")
        weights = gguf_quantize.importance(context.grams, model_of(source.path))
    draft = Draft(source.path, origin)
    context.warnings += draft.warnings
    chosen = _write(step, draft, file, weights, context)
    if step.rounding == "keep":
        from lighten.export.gguf.kept_codes import keep_codes

        chosen |= keep_codes(file, draft)
    elif step.propagate and context.grams:
        from lighten.export.gguf.two_streams import round_in_streams

        chosen["rounding"] = round_in_streams(file, draft, context)
    elif step.rounding and context.grams:
        from lighten.export.gguf.rounding import compensate

        chosen["rounding"] = compensate(file, draft, context.grams, context.report)
    facts = {**gguf_quantize.describe(file, step.type), "imatrix": weights is not None, **chosen}
    if step.type == "MXFP4" and "MXFP4" not in facts["tensor_types"]:
        context.warnings.append("this model has no experts, and llama.cpp gives MXFP4 to experts alone: all is Q8_0")
    if step.split:
        facts["files"] = [part.name for part in split(file, step.split, context.report)]
    if file.is_file():  # Ollama opens no parts
        words = draft.vocabulary
        bos = words.tokens[words.ids["bos"]] if words.add_bos and "bos" in words.ids else None
        text = modelfile(file.name, source.path, bos, words.tokens)
        (out / MODELFILE).write_text(text, encoding="utf-8")
    return facts


def _write(step: Gguf, draft: Draft, file: Path, weights: Importance | None, context: Context) -> dict[str, Any]:
    """Writes the file; returns what a budget chose."""
    if step.budget:
        assert context.sensitivity
        assert context.grams
        assert weights
        prices = Prices(context.grams, Sensitivity.read(context.sensitivity))
        return fit(draft, file, step.budget.size, step.budget.bits, prices, weights, context.report)
    if not step.rounded:
        draft.save_plain(file, step.type, context.report)
        return {}
    plain = file.with_name("plain.gguf")
    try:
        draft.save_plain(plain)
        gguf_quantize.quantize(plain, file, step.type, weights, context.report)
    finally:
        plain.unlink(missing_ok=True)
    return {}
