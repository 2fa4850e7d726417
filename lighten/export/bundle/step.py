"""The `export` step for bundles: a directory that runs on a device, and its archive."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.export.bundle import bundle
from lighten.export.bundle.readme import readme
from lighten.export.bundle.settings import Bundle, others_of
from lighten.export.bundle.targets import find_target
from lighten.export.step import about
from lighten.facts import ModelFacts
from lighten.model.checkpoint import Checkpoint
from lighten.model.gguf_header import MODELFILE
from lighten.model.gguf_source import inspect
from lighten.step import Context
from lighten.store.artifact import Artifact
from lighten.store.names import as_name
from lighten.store.store import write_file


def run(step: Bundle, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the bundle and its archive, and returns its facts.

    Raises:
        RequestError: the source is neither a model nor a GGUF artifact.
        Failure: the new file does not fit the target.
    """
    step.check_source(source.format)
    target, origin = find_target(step.target), about(source)
    made = _model(step, source, out, context)
    model = bundle.read_model(sorted(out.glob("*.gguf")))
    tokens = min(step.context, model.trained_context or step.context)
    if tokens < step.context:
        context.warnings.append(f"the model was trained for {tokens:,} tokens: the bundle's context is that")
    need = bundle.Need(model.size_bytes, tokens * model.cache_per_token, model.runtime_bytes)
    chosen = str(made["type"])
    others = others_of(facts, tokens) if (facts := _sizes(model.files[0])) else ()
    with _late():
        sentence = bundle.check_fit(need, target, tokens, chosen, others)
    context.report(1, 4, sentence)
    short = as_name(origin.get("name") or "model")[:80]
    written = bundle.write_bundle(
        out, model, target, name=f"{short}-{chosen}", type=chosen, context=tokens, about=origin
    )
    bundle.write_sums(out)
    size = sum((out / name).stat().st_size for name in bundle.contents(out))
    measured, why = None, "the recipe said not to"
    if step.measure:
        context.report(2, 4, "measuring it here")
        try:
            measured = bundle.measure(out, target, model)
        except Failure as error:
            why = str(error)
            context.warnings.append(why)
    write_file(out / "measured.json", (json.dumps(measured, indent=1) + "\n").encode())
    write_file(out / "README.md", readme(written, model, need, target, measured, why).encode())
    context.report(3, 4, "packing")
    folder = f"bundle-{target.name}"
    bundle.pack(out, out / f"{folder}{bundle.ARCHIVE}", folder)
    context.report(4, 4, sentence)
    return {
        **made,
        "format": "bundle",
        "target": target.name,
        "context": tokens,
        "size_bytes": size,
        "need_bytes": {"weights": need.weights, "cache": need.cache, "runtime": need.runtime, "total": need.total},
        "free_bytes": target.free_bytes,
        "read_bytes_per_token": bundle.read_bytes(model),
        "ceiling_tok_s": round(target.bandwidth / bundle.read_bytes(model), 2),
        "fit": sentence,
    }


def _model(step: Bundle, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Puts the GGUF file or files into `out`; returns their facts."""
    if source.format == "gguf":
        held = str(source.facts.get("type", "GGUF"))
        if step.type and step.type != held:
            raise RequestError(f"the source is a GGUF file of type {held} already: leave out `type`")
        files = sorted(source.path.glob("*.gguf"))
        if not files:
            raise Failure(f"{source.path} holds no .gguf file")
        for file in files:
            shutil.copyfile(file, out / file.name)
            os.chmod(out / file.name, 0o644)
        return {"type": held, **source.facts}

    with _late():
        context.report(0, 4, step.check_size(Checkpoint(source.path).facts))
    facts = step.gguf.run(source, out, context)
    (out / MODELFILE).unlink(missing_ok=True)  # a bundle has programs of its own
    return facts


def _sizes(file: Path) -> ModelFacts | None:
    """Returns the sizes of a model; None if lighten does not read its architecture."""
    try:
        return inspect(file)
    except (RequestError, Failure):
        return None


@contextmanager
def _late() -> Iterator[None]:
    """Turns a refusal that could not be known before into a failure of this variant alone."""
    try:
        yield
    except RequestError as error:
        raise Failure(str(error)) from error
