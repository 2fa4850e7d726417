"""Runs the stages that the store lacks, and publishes a version: links, results, report."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.polish.settings import Polish
from lighten.errors import Failure, LightenError, RequestError
from lighten.evaluate import machine
from lighten.evaluate.serving.host import Host
from lighten.pipeline import trust
from lighten.pipeline.build import Builder, builder_of, check_options, choose_device
from lighten.pipeline.checks import check_memory, check_texts
from lighten.pipeline.plan import make_plan
from lighten.pipeline.predict import Predictor
from lighten.pipeline.recipe import BASELINE, Recipe, load
from lighten.pipeline.roofline import RooflineAndCost
from lighten.pipeline.rows import row_of
from lighten.pipeline.stage import Plan, Stage
from lighten.pipeline.watcher import Silent, Watcher
from lighten.process.isolate import run_isolated, warm
from lighten.results.results import Results
from lighten.store.links import point
from lighten.store.store import Store, check_name, write_json


def plan(
    recipe: str | Recipe,
    *,
    only: list[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    trust_tasks: bool = False,
    trust_servers: bool = False,
) -> Plan:
    """Returns the stages of a recipe (a path, the name of a ready one, or a Recipe) on a device.

    Raises:
        RequestError: `run` would refuse it, or the recipe asks for trust that is not granted here.
    """
    opened = open_recipe(recipe, only)
    trust.check(opened, trust_remote_code=trust_remote_code, trust_tasks=trust_tasks, trust_servers=trust_servers)
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
    trust_servers: bool = False,
) -> Path:
    """Runs or resumes a recipe; returns the directory of its version.

    `trust_remote_code` allows the code of the models that the recipe names for it. `trust_tasks` allows the code of its
    task files, `trust_servers` the programs and addresses that it names for servers. A recipe can only ask for these.

    A variant that fails is a row in the results with the reason; see its `status`.

    Raises:
        RequestError: the recipe or what it asks for is wrong; nothing was run.
        Failure: the source itself could not be read.
    """
    watcher = watcher or Silent()
    opened = open_recipe(recipe, only)
    trust.check(opened, trust_remote_code=trust_remote_code, trust_tasks=trust_tasks, trust_servers=trust_servers)
    found = choose_device(device, watcher)
    todo = make_plan(opened, only, found)
    check_texts(todo.source.path, todo.recipe.evaluate)
    check_memory(todo)
    for each in todo.recipe.evaluate.asked:
        each.prepare()
    store = Store(Path(artifacts))
    chosen = found.name
    check_options(todo.recipe.evaluate.speed, chosen)
    predictor = Predictor(store, found)
    predicted = {stage.key: predictor.predict(stage) for stage in todo.stages}
    watcher.planned(todo, {key: prediction.seconds for key, prediction in predicted.items()})
    root = todo.artifacts[BASELINE]
    logs = store.root / opened.name / "servers"
    with store.lease(stage.key for stage in todo.stages), Host(logs, watcher.say) as host:
        if any(store.find(stage.key) is None for stage in todo.stages):
            warm()
        builder = builder_of(todo, store, predictor, chosen, watcher, {root.key}, host)
        for stage in todo.in_order:
            builder.build(stage)
        if root.key in builder.failed:
            raise Failure(builder.failed[root.key])
        results = _results(todo, builder, predicted, RooflineAndCost(todo.recipe.evaluate, watcher))
        with store.publishing(todo.recipe.name):
            return _publish(todo, builder, results, store, watcher)


def _publish(todo: Plan, builder: Builder, results: dict[str, Any], store: Store, watcher: Watcher) -> Path:
    """Writes the next version, unless the latest one says the same. Call it while publishing."""
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


def _results(
    todo: Plan, builder: Builder, predicted: dict[str, Any], roofline_and_cost: RooflineAndCost
) -> dict[str, Any]:
    """Returns the contents of results.json."""
    root = builder.done[todo.artifacts[BASELINE].key]
    facts = todo.source.facts
    rows = {name: row_of(name, todo, builder, root) for name in todo.artifacts}
    for name, stage in todo.artifacts.items():
        if stage.key in builder.done:
            roofline_and_cost.add_to(rows[name], builder.done[stage.key].path, stage.facts)
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
    warnings += roofline_and_cost.warnings
    return {
        "schema": 1,
        "recipe": todo.recipe.name,
        "version": "",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**machine.fingerprint(), **roofline_and_cost.machine()},
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
    if not any(stage.kind in (Sweep.kind, Polish.kind) and stage.key in builder.done for stage in todo.stages):
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
