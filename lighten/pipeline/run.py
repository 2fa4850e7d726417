"""Runs what the store does not have, and puts a version together: links, results, report."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from lighten.compress.calibrate.sweep import Sweep
from lighten.errors import DiskFull, Failure, LightenError, RequestError
from lighten.evaluate import machine, paired
from lighten.evaluate.accuracy import harness
from lighten.evaluate.loaders import survey as loaders
from lighten.evaluate.parity import parity
from lighten.evaluate.settings import Speed
from lighten.evaluate.speed.options import lacking
from lighten.model.accelerator import Device, resolve
from lighten.model.source import Source
from lighten.pipeline import trust
from lighten.pipeline.plan import (
    TIMED,
    Plan,
    Predictor,
    Stage,
    check_memory,
    check_texts,
    make_plan,
    measuring_packages,
    this_machine,
    trusted,
    what,
)
from lighten.pipeline.recipe import BASELINE, Recipe, load
from lighten.pipeline.roofline import Addition
from lighten.process.isolate import Outcome, run_isolated, warm
from lighten.results.results import Results
from lighten.step import Report
from lighten.store.links import point
from lighten.store.store import Artifact, Store, check_name, write_json

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx.data")


class Watcher(Protocol):
    """Is told what a run does; the CLI draws it."""

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """All stages and their predicted seconds, by key."""

    def started(self, stage: Stage) -> Report:
        """A stage begins; returns where its progress goes."""

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """A stage ended: cached if `seconds` is None, failed if `error` is given."""

    def say(self, message: str) -> None:
        """Something the person should know."""


class Silent:
    """A watcher that tells nobody."""

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """Ignores it."""

    def started(self, stage: Stage) -> Report:
        """Returns a report that goes nowhere."""
        return lambda done, total, note: None

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """Ignores it."""

    def say(self, message: str) -> None:
        """Ignores it."""


class Builder:
    """Builds the stages of one plan, each at most once, and remembers why one failed."""

    def __init__(
        self,
        store: Store,
        predictor: Predictor,
        device: str,
        watcher: Watcher,
        source: dict[str, Any],
        fatal: Collection[str] = (),
    ) -> None:
        self.store = store
        self.device = device
        self.watcher = watcher
        self.predictor = predictor
        self.source = source
        self.fatal = fatal
        """Keys of stages whose failure ends the command, which says why: the watcher need not."""
        self.names: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.done: dict[str, Artifact] = {}
        self.cached: set[str] = set()

    def build(self, stage: Stage) -> Artifact | None:
        """Returns the object of a stage, building it if the store has no sound one; None if it failed."""
        self.names[stage.key] = stage.step.model if isinstance(stage.step, Source) else stage.name
        broken = next((parent for parent in stage.parents if parent.key in self.failed), None)
        if broken:
            self.failed[stage.key] = f"needs {broken.name}, which failed: {self.failed[broken.key]}"
            return None
        try:
            with self._locked(stage):
                artifact = self.store.sound(stage.key, lambda damage: self.watcher.say(f"{stage.name}: {damage}"))
                if artifact:
                    self.cached.add(stage.key)
                    self.watcher.ended(stage, None, None)
                else:
                    artifact = self._run(stage)
        except DiskFull:
            raise
        except RequestError as error:
            raise RequestError(self.in_words(str(error))) from error
        except LightenError as error:
            self.failed[stage.key] = self.in_words(str(error))
            self.watcher.ended(stage, None, "failed" if stage.key in self.fatal else self.failed[stage.key])
            return None
        self.done[stage.key] = artifact
        return artifact

    def in_words(self, message: str) -> str:
        """Returns a message with the names of models and stages in place of where the store keeps them."""
        places = {
            str(place) for place in (self.store.objects, self.store.objects.absolute(), self.store.objects.resolve())
        }
        where = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
        stored = re.compile(rf"(?:{where})/(?:\.tmp-)?([0-9a-f]{{64}})(?:-\w+)?")
        return stored.sub(lambda found: self.names.get(found[1], found[0]), message)

    @contextlib.contextmanager
    def _locked(self, stage: Stage) -> Iterator[None]:
        with self.store.lock(stage.key, wait=False) as held:
            if held:
                yield
                return
        self.watcher.say(f"another run is building {stage.name}: waiting for it")
        with self.store.lock(stage.key):
            yield

    def _run(self, stage: Stage) -> Artifact:
        report = self.watcher.started(stage)
        with self.store.building(stage.key) as out:
            outcome = self._work(stage, out, report)
            facts = dict(outcome.value)
            warnings = [self.in_words(warning) for warning in facts.pop("warnings", [])]
            origin = stage.parents[0].key if stage.parents else None
            inherited = self.done[origin].manifest["source"] if origin else {}
            manifest = {
                "kind": "measurement" if stage.measure else stage.kind,
                "format": facts.pop("format", "measurement"),
                "key": stage.key,
                "parents": [parent.key for parent in stage.parents],
                "step": {"kind": stage.kind, "version": stage.version},
                "config": stage.config,
                "facts": facts,
                "warnings": warnings,
                "packages": measuring_packages(),
                "source": {**self.source, **inherited, **({"licence": facts["licence"]} if "licence" in facts else {})},
            }
            artifact = self.store.finish(out, manifest)
        self.store.drop_scratch(stage.key)
        cost = {
            "what": what(stage),
            "machine": this_machine() | Device(self.device).key(),
            "seconds": outcome.seconds,
            "nominal_seconds": self.predictor.nominal_seconds(stage),
            "peak_bytes": outcome.peak_rss_bytes,
            "disk_bytes": artifact.size_bytes,
        }
        self.store.record_cost(stage.key, cost)
        for warning in warnings:
            self.watcher.say(f"{stage.name}: {warning}")
        self.watcher.ended(stage, outcome.seconds, None)
        return artifact

    def _work(self, stage: Stage, out: Path, report: Report) -> Outcome:
        if stage.measure == "loaders":
            return self._survey(stage, out, report)
        target, payload = self._task(stage, out)
        outcome = run_isolated(target, payload, report, fresh=stage.measure in TIMED)
        promised = stage.step.promises() if stage.step else None
        return self._compared(promised, stage, out, outcome, report) if promised else outcome

    def _survey(self, stage: Stage, out: Path, report: Report) -> Outcome:
        assert stage.parents[0].facts
        begin = time.monotonic()
        try:
            found = loaders.survey(
                self.done[stage.parents[0].key].path,
                vocab=stage.parents[0].facts.vocab,
                device=self.device,
                trust_remote_code=trusted(stage),
                report=report,
            )
        except RequestError as error:  # what no loader reads is a row that says so, and no end of the run
            raise Failure(str(error)) from error
        loads = [{**load, "error": load["error"] and self.in_words(load["error"])} for load in found.loads]
        write_json(out / paired.RESULT, {"measurement": "loaders", "loads": loads})
        return Outcome({"loads": loads}, time.monotonic() - begin, found.peak_rss_bytes)

    def _compared(self, promised: dict[str, Any], stage: Stage, out: Path, outcome: Outcome, report: Report) -> Outcome:
        """Returns the outcome with what was found when an export was compared with its source.

        Raises:
            Failure: it is not the same model any more.
        """
        made = out / str(outcome.value["file"]) if "file" in outcome.value else out
        payload = {
            "source": str(self.done[stage.parents[0].key].path),
            "made": str(made),
            "trust_remote_code": trusted(stage),
            **promised,
        }
        found = parity.check(payload, report)
        value = {**outcome.value, **found.value, "warnings": outcome.value["warnings"] + found.value["warnings"]}
        peak = max(outcome.peak_rss_bytes, found.peak_rss_bytes)
        return Outcome(value, outcome.seconds + found.seconds, peak)

    def _task(self, stage: Stage, out: Path) -> tuple[str, dict[str, Any]]:
        paths = [str(self.done[parent.key].path) for parent in stage.parents]
        if stage.measure:
            assert stage.settings is not None
            reference = {"hidden": paths[2], "model": paths[1]} if len(paths) > 2 else None
            drafted = stage.measure == "speculative"
            return "lighten.evaluate.run:measure", {
                "measurement": stage.measure,
                "config": stage.settings.model_dump(mode="json"),
                "model": paths[0],
                "tokenizer": paths[1] if len(paths) > 1 and not drafted else paths[0],
                "draft": paths[1] if drafted else None,
                "out": str(out),
                "device": self.device,
                "arithmetic": stage.arithmetic,
                "trust_remote_code": trusted(stage),
                "reference": reference,
                "save_hidden": stage.measure == "perplexity" and reference is None,
            }
        assert stage.step is not None
        return "lighten.pipeline.steps:run_step", {
            "kind": stage.kind,
            "settings": stage.step.model_dump(mode="json"),
            "inputs": dict(zip(stage.roles, paths, strict=True)),
            "scratch": str(self.store.scratch(stage.key)) if stage.step.lessons() else None,
            "out": str(out),
            "key": stage.key,
            "device": self.device,
            "trust_remote_code": trusted(stage),
        }


def choose_device(device: str, watcher: Watcher | None = None) -> Device:
    """Returns the device of a name, which torch was asked for; "auto" is a GPU where torch can use one.

    Raises:
        RequestError: no such device, or torch cannot use it.
    """
    found = resolve(device, gpus=bool(machine.fingerprint()["gpus"]))
    if found.note and watcher:
        watcher.say(found.note)
    return found


def check_options(speed: Speed | None, device: str) -> None:
    """Raises RequestError for options that this machine has not the means for; those of single variants may fail."""
    if speed and (lack := lacking(speed, device)):
        raise RequestError(lack)


def plan(
    recipe: str | Recipe,
    *,
    only: list[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    trust_tasks: bool = False,
) -> Plan:
    """Returns the stages of a recipe (a path, the name of a ready one, or a Recipe) on a device.

    Raises:
        RequestError: what `run` would refuse; trust that the recipe asks for and that is not given here.
    """
    opened = open_recipe(recipe, only)
    trust.check(opened, trust_remote_code=trust_remote_code, trust_tasks=trust_tasks)
    todo = make_plan(opened, only, choose_device(device))
    check_texts(todo.source.path, todo.recipe.evaluate)
    check_memory(todo)
    return todo


def open_recipe(recipe: str | Recipe, only: list[str] | None) -> Recipe:
    """Returns a recipe, loaded if it is given by name, after checking that the variants in `only` are in it."""
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    check_name(recipe.name)
    unknown = [name for name in only or () if name not in recipe.variants and name != BASELINE]
    if unknown:
        raise RequestError(f"the recipe has no variant {unknown[0]!r}; it has {', '.join(recipe.variants)}")
    return recipe


def run(
    recipe: str | Recipe,
    *,
    artifacts: str | Path = "artifacts",
    only: list[str] | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
    trust_tasks: bool = False,
) -> Path:
    """Runs or resumes a recipe; returns the directory of its version.

    `trust_remote_code` lets the code run that comes with the models that the recipe names for it, `trust_tasks` what
    its task files say: a recipe can only ask for either.

    A variant that fails is a row in the results that says why; look at their `status`.

    Raises:
        RequestError: the recipe or what it asks for is wrong; nothing was run.
        Failure: the source itself could not be read.
    """
    watcher = watcher or Silent()
    opened = open_recipe(recipe, only)
    trust.check(opened, trust_remote_code=trust_remote_code, trust_tasks=trust_tasks)
    found = choose_device(device, watcher)
    todo = make_plan(opened, only, found)
    check_texts(todo.source.path, todo.recipe.evaluate)
    check_memory(todo)
    for task in todo.recipe.evaluate.accuracy:
        if task.task_file:  # what the plan only read: wrong data is found before work is done
            harness.build(task)
    store = Store(Path(artifacts))
    chosen = found.name
    check_options(todo.recipe.evaluate.speed, chosen)
    predictor = Predictor(store, found)
    predicted = {stage.key: predictor.predict(stage) for stage in todo.stages}
    watcher.planned(todo, {key: prediction.seconds for key, prediction in predicted.items()})
    root = todo.artifacts[BASELINE]
    with store.lease(stage.key for stage in todo.stages):
        if any(store.find(stage.key) is None for stage in todo.stages):
            warm()
        builder = build_all(todo, store, predictor, chosen, watcher, {root.key})
        if root.key in builder.failed:
            raise Failure(builder.failed[root.key])
        results = _results(todo, builder, predicted, Addition(todo.recipe.evaluate, watcher))
        with store.publishing(todo.recipe.name):
            return _publish(todo, builder, results, store, watcher)


def build_all(
    todo: Plan, store: Store, predictor: Predictor, device: str, watcher: Watcher, fatal: Collection[str] = ()
) -> Builder:
    """Builds every stage of a plan, measurements last; call while the store has a lease of their keys.

    The failure of a `fatal` one is for the caller to tell.
    """
    source = {"id": todo.source.name, "revision": todo.recipe.revision, "identity": todo.source.identity}
    builder = Builder(store, predictor, device, watcher, source, fatal)
    for stage in sorted(todo.stages, key=lambda stage: stage.measure is not None):
        builder.build(stage)
    return builder


def _publish(todo: Plan, builder: Builder, results: dict[str, Any], store: Store, watcher: Watcher) -> Path:
    """Writes the next version, unless the latest one already says the same; call while publishing."""
    from lighten.report.history import read
    from lighten.report.render import write_report

    name = todo.recipe.name
    keys = sorted(builder.done)
    latest = store.latest(name)
    if latest and not builder.failed and _same(latest, keys, todo.recipe.dump()):
        watcher.say(f"nothing changed since {latest}")
        return latest
    number = int(latest.name[1:]) + 1 if latest else 1
    results["version"] = f"v{number}"
    try:
        results["calibration"] = _calibration(todo, builder)
    except LightenError as error:
        watcher.say(f"the calibration text could not be compared with the evaluation sets: {error}")
    with store.new_version(name) as folder:
        (folder / "recipe.yaml").write_text(todo.recipe.dump(), encoding="utf-8")
        write_json(folder / "objects.json", keys)
        links = folder / "variants"
        links.mkdir()
        for variant, stage in todo.artifacts.items():
            if stage.key in builder.done:
                point(links / variant, f"../../../objects/{stage.key}")
        write_json(folder / "results.json", results)
        earlier, refused = read(store.versions(name))
        for line in refused:
            watcher.say(line)
        write_report(Results.model_validate(results), folder, earlier)
    published = store.latest(name)
    assert published is not None
    return published


def _same(version: Path, keys: list[str], recipe: str) -> bool:
    try:
        recorded = json.loads((version / "objects.json").read_text())
        complete = all((version / file).is_file() for file in ("results.json", "report.html", "report.md"))
        return bool(recorded == keys and complete and (version / "recipe.yaml").read_text(encoding="utf-8") == recipe)
    except (OSError, ValueError):
        return False


def _results(todo: Plan, builder: Builder, predicted: dict[str, Any], addition: Addition) -> dict[str, Any]:
    """Returns the contents of results.json."""
    root = builder.done[todo.artifacts[BASELINE].key]
    facts = todo.source.facts
    rows = {name: _row(name, todo, builder, root) for name in todo.artifacts}
    for name, stage in todo.artifacts.items():
        if stage.key in builder.done:
            addition.to(rows[name], builder.done[stage.key].path, stage.facts)
    stages = []
    for stage in todo.stages:
        cost = builder.store.cost(stage.key) if stage.key in builder.done else None
        prediction = predicted[stage.key]
        stages.append(
            {
                "name": stage.name,
                "kind": stage.measure or stage.kind,
                "key": stage.key,
                "variants": stage.variants,
                "cached": stage.key in builder.cached,
                "predicted": {
                    "seconds": prediction.seconds,
                    "peak_bytes": prediction.peak_bytes,
                    "disk_bytes": prediction.disk_bytes,
                },
                "actual": cost and {name: cost[name] for name in ("seconds", "peak_bytes", "disk_bytes")},
            }
        )
    warnings = [f"{stage.name}: {text}" for stage in todo.stages for text in _warnings(builder, stage)]
    warnings += addition.warnings
    return {
        "schema": 1,
        "recipe": todo.recipe.name,
        "version": "",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**machine.fingerprint(), **addition.machine()},
        "source": {
            "model": todo.recipe.model,
            "params": root.facts["params"],
            "licence": root.manifest["source"].get("licence"),
            "architecture": facts.architecture,
            "layers": facts.layers,
            "hidden": facts.hidden,
            "vocab": facts.vocab,
            "identity": todo.source.identity,
        },
        "variants": list(rows.values()),
        "stages": stages,
        "recipe_yaml": todo.recipe.dump(),
        "warnings": warnings,
    }


def _calibration(todo: Plan, builder: Builder) -> dict[str, Any] | None:
    """Returns the calibration text and what it shares with the evaluation sets; None if no variant used it."""
    if not any(stage.kind == Sweep.kind and stage.key in builder.done for stage in todo.stages):
        return None
    payload = {
        "model": str(builder.done[todo.artifacts[BASELINE].key].path),
        "calibration": todo.recipe.calibration.model_dump(mode="json"),
        "evaluate": todo.recipe.evaluate.model_dump(mode="json"),
    }
    described: dict[str, Any] = run_isolated("lighten.pipeline.calibration:describe", payload).value
    return described


def _warnings(builder: Builder, stage: Stage) -> list[str]:
    return list(builder.done[stage.key].manifest["warnings"]) if stage.key in builder.done else []


def _row(name: str, todo: Plan, builder: Builder, root: Artifact) -> dict[str, Any]:
    stage = todo.artifacts[name]
    steps = [] if name == BASELINE else [{step.kind: step.dump()} for step in todo.recipe.steps(name)]
    row: dict[str, Any] = {"name": name, "key": stage.key, "status": "ok", "error": None, "steps": steps}
    failed = [each for each in (stage, *todo.measurements[name]) if each.key in builder.failed]
    if failed:
        row |= {"status": "failed", "error": f"{failed[0].name}: {builder.failed[failed[0].key]}"}
    artifact = builder.done.get(stage.key)
    if not artifact:
        return row
    row |= describe(artifact, _nearest(stage, builder, "params")) | {"path": f"variants/{name}"}
    row["training"] = _nearest(stage, builder, "training")
    measured = []
    pairs = [[each for each in todo.measurements[of] if each.measure != "speculative"] for of in (name, BASELINE)]
    for each, base in zip(*pairs, strict=True):
        found, against = builder.done.get(each.key), builder.done.get(base.key)
        if found:
            measured.append((each.measure, found.path, against.path if against else None))
    add_measurements(row, measured, name == BASELINE)
    row["speculative"] = _speculative(name, todo, builder)
    if name != BASELINE:
        row.setdefault("delta", {})["size_ratio"] = row["size_bytes"] / root.size_bytes
    return row


def _speculative(name: str, todo: Plan, builder: Builder) -> dict[str, Any] | None:
    """Returns what a draft is worth to this variant, if that was measured."""
    asked = todo.recipe.evaluate.speculative
    if not asked or asked.target != name:
        return None
    stage = next((each for each in todo.measurements.get(asked.draft, []) if each.measure == "speculative"), None)
    found = builder.done.get(stage.key) if stage else None
    return {"draft": asked.draft, **paired.read(found.path)["speculative"]} if found else None


def _nearest(stage: Stage, builder: Builder, fact: str) -> Any:
    """Returns a fact of an artifact, or of the nearest that it was made from and has it."""
    found = builder.done[stage.key].facts.get(fact)
    return found if found is not None or not stage.parents else _nearest(stage.parents[0], builder, fact)


def describe(artifact: Artifact, params: int) -> dict[str, Any]:
    """Returns the columns of a row that need no measuring: format, size, bits per weight, facts."""
    weights = sum(entry["size"] for entry in artifact.manifest["files"] if entry["path"].endswith(WEIGHTS))
    return {
        "format": artifact.format,
        "size_bytes": artifact.facts.get("size_bytes", artifact.size_bytes),
        "bits_per_weight": 8 * weights / params,
        "params": params,
        "facts": {name: value for name, value in artifact.facts.items() if name != "training"},
        "notes": list(artifact.manifest["warnings"]),
    }


def _note_vocabulary(row: dict[str, Any], other: str) -> None:
    """Writes into a row that its vocabulary is not the baseline's, and what follows from that."""
    row["vocabulary"] = other
    note = (
        f"its vocabulary is not the baseline's ({other}), so it is measured on tokens of its own: compare bits per "
        "byte, not perplexity; there is no KL divergence"
    )
    if note not in row.setdefault("notes", []):
        row["notes"].append(note)


def add_measurements(row: dict[str, Any], measured: list[tuple[Any, Path, Path | None]], is_baseline: bool) -> None:
    """Puts measurements into a row: (kind, its directory, the baseline's directory or None) of each."""
    for kind, path, against in measured:
        result = json.loads((path / "result.json").read_text())
        if kind == "loaders":
            row["loads"] = result["loads"]
            continue
        if other := result.get("vocabulary"):
            _note_vocabulary(row, other)
        row["runtime"] = result.get("runtime", row.get("runtime"))
        row["device"] = result.get("device", row.get("device"))
        if kind == "perplexity":
            found = result["perplexity"]
            found["protocol"] = {"name": "lighten", **found["protocol"]}  # results from before there were several
            if "perplexity" not in row:
                row["perplexity"] = found
            else:
                row.setdefault("other_perplexity", []).append(found)
            row["divergence"] = row.get("divergence") or result.get("divergence")
            note = "its own tokenizer gives other ids than the baseline's on this text"
            if result.get("tokenizer_match") is False and note not in row.setdefault("notes", []):
                row["notes"].append(note)
        elif kind == "accuracy":
            row.setdefault("accuracy", []).append(result["accuracy"])
        elif kind == "load":
            row["load"] = result["load"]
            continue
        else:
            row |= {"speed": result["speed"], "memory": result["memory"], "energy": result["energy"]}
        if against and not is_baseline and not (other and kind == "perplexity"):
            delta = row.setdefault("delta", {})
            change = paired.compare(kind, path, against)
            if kind == "accuracy":
                delta.setdefault("accuracy", []).append(change)
            elif kind == "perplexity" and "other_perplexity" in row:
                change = {"protocol": result["perplexity"]["protocol"]["name"], **change["perplexity"]}
                delta.setdefault("other_perplexity", []).append(change)
            else:
                delta |= change
