"""One side of a comparison: its row, and the measurements behind it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.compare.operand import VariantOf, Version
from lighten.data import text
from lighten.errors import RequestError
from lighten.evaluate import machine
from lighten.evaluate.machine import this_machine
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.request import Request
from lighten.evaluate.settings import Evaluate
from lighten.model import vocabulary
from lighten.model.source import Found, find
from lighten.pipeline.checks import check_measurable
from lighten.pipeline.recipe import parse_settings
from lighten.pipeline.rows import add_measurements, describe_source
from lighten.pipeline.watcher import Watcher
from lighten.process.isolate import run_isolated
from lighten.report.asked import asked
from lighten.results.results import Variant
from lighten.store.artifact import Artifact
from lighten.store.files import stage_key
from lighten.store.names import as_name
from lighten.store.store import Store


@dataclass(frozen=True)
class Side:
    """A variant or a model, with everything that was measured on it."""

    text: str
    row: Variant
    machine: dict[str, Any]
    """Machine that its speed was measured on."""
    perplexity: Artifact | None = None
    accuracy: dict[str, Artifact] = field(default_factory=dict)
    """Measurements with their values, by task; empty if only the results exist."""
    model: Path | None = None
    tokenizer: Path | None = None
    """Model whose tokenizer gave the ids."""


def of_variant(operand: VariantOf) -> Side:
    """Returns a variant of a version. Its measurements come from the version's stages."""
    version, row = operand.version, operand.row
    where = row.facts.get("machine", version.results.machine)
    side = Side(operand.text, row, where if isinstance(where, dict) else {"cpu": where})
    store = version.store
    if store is None or row.key is None:
        return side
    perplexity, accuracy, tokenizer = None, {}, None
    for stage in version.results.stages:
        if stage.kind not in ("perplexity", "accuracy") or (found := store.find(stage.key)) is None:
            continue
        parents = found.manifest["parents"]
        if parents[0] != row.key:
            continue
        tokenizer = store.find(parents[min(1, len(parents) - 1)])
        if stage.kind == "perplexity":
            perplexity = found
        else:
            accuracy[str(found.manifest["config"]["task"])] = found
    made = store.find(row.key)
    return Side(
        operand.text,
        row,
        side.machine,
        perplexity,
        accuracy,
        made.path if made else None,
        tokenizer.path if tokenizer else None,
    )


def protocol_of(version: Version) -> tuple[Evaluate, Path]:
    """Returns what a version measured, and the baseline whose tokenizer it used, to measure a model in the same way.

    Raises:
        RequestError: the version does not say, or its baseline no longer exists.
    """
    recipe = asked(version.results)
    if not recipe.get("evaluate"):
        raise RequestError(f"{version.text} does not say what it measured: name a version that `lighten run` made")
    baseline = version.results.baseline
    made = version.store.find(baseline.key) if version.store and baseline and baseline.key else None
    if made is None:
        raise RequestError(
            f"the baseline of {version.text} is not in its store any more, so nothing can be measured as it was: "
            "run the recipe again"
        )
    if not isinstance(recipe["evaluate"], dict):
        raise RequestError(f"the recipe in the results of {version.text} does not say what to evaluate")
    where = f"the recipe in the results of {version.text}"
    return parse_settings(Evaluate, {**recipe["evaluate"], "loaders": False}, where), made.path


def of_model(
    name: str,
    evaluate: Evaluate,
    tokenizer: Path | None,
    *,
    store: Store,
    device: str,
    watcher: Watcher,
    kept: contextlib.ExitStack,
    trust_remote_code: bool = False,
) -> Side:
    """Returns a model that lies anywhere, measured now unless the store has its measurements.

    Args:
        name: a directory, a .gguf or .onnx file, a hub id or demo:NAME.
        evaluate: what to measure.
        tokenizer: the model whose tokenizer gives the ids; None for its own.
        store: where measurements are kept, under the SHA-256 of model and settings.
        device: where to run.
        watcher: is told what is measured.
        kept: keeps the leases of the measurements as long as they are looked at.
        trust_remote_code: lets the code run that lies beside the weights; the person's word.

    Raises:
        RequestError: there is no such model.
        Failure: it cannot be measured.
    """
    source = find(name, trust_remote_code=trust_remote_code)
    check_measurable(source.facts, evaluate, name)
    ids = find(str(tokenizer), trust_remote_code=trust_remote_code) if tokenizer else source
    if tokenizer and (other := vocabulary.differing(ids.path, source.path)):
        raise RequestError(
            f"{name} and its baseline have different vocabularies ({other}): their tokens cannot be paired. "
            "`lighten evaluate` measures each on its own tokens and puts bits per byte side by side"
        )
    for task in evaluate.accuracy:
        if task.harness:
            raise RequestError(f"a model beside a variant is not measured in lm-eval's {task.task}: name two variants")

    def measured(settings: Measurement) -> Artifact:
        return _measured(settings, source, ids, store, device, watcher, kept, trust_remote_code)

    accuracy = [(task, measured(task)) for task in evaluate.accuracy]
    leading = [(first, measured(first)) for first in evaluate.perplexity[:1]]  # the one that leads the report
    speed = [(each, measured(each)) for each in (evaluate.speed,) if each]
    done: list[tuple[Measurement, Artifact]] = [*accuracy, *leading, *speed]
    row: dict[str, Any] = {"name": as_name(source.path.name), "status": "ok", **describe_source(source)}
    add_measurements(row, [(settings, artifact.path, None) for settings, artifact in done], True)
    return Side(
        name,
        Variant.model_validate_json(json.dumps(row)),
        machine.fingerprint(),
        leading[0][1] if leading else None,
        {task.task: artifact for task, artifact in accuracy},
        source.path,
        ids.path,
    )


def _measured(
    settings: Measurement,
    source: Found,
    ids: Found,
    store: Store,
    device: str,
    watcher: Watcher,
    kept: contextlib.ExitStack,
    trusted: bool,
) -> Artifact:
    config = {"measure": settings.name, **settings.key_config(), "packages": settings.packages()}
    if isinstance(settings, Perplexity):  # the whole text by every protocol: kept as it was, for the keys
        config["data"] = text.identity(settings.data, "perplexity")
    elif data := settings.data_digest():
        config["data"] = data
    if settings.timed:
        config["machine"] = this_machine()
    if trusted:
        config["trust_remote_code"] = True  # other code may compute other numbers
    key = stage_key("measure-model", 1, {**config, "device": device}, [source.identity, ids.identity])
    kept.enter_context(store.lease([key]))
    with store.lock(key):
        if found := store.sound(key, watcher.say):
            return found
        watcher.say(f"{settings.name} of {source.name}")
        with store.building(key) as out:
            request = Request(
                settings,
                model=source.path,
                tokenizer=ids.path,
                out=out,
                device=device,
                trust_remote_code=trusted,
            )
            run_isolated("lighten.evaluate.run:measure", request.payload(), fresh=settings.timed)
            manifest = {
                "kind": "measurement",
                "format": "measurement",
                "key": key,
                "parents": [],
                "config": config,
                "source": {"id": source.name, "identity": source.identity},
            }
            return store.finish(out, manifest)
