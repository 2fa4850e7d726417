"""The commands of one step, as a recipe of one variant; and measurements of models without a recipe."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lighten.compress.calibrate.sweep import Sweep
from lighten.errors import DiskFull, Failure, LightenError, RequestError
from lighten.evaluate import machine
from lighten.evaluate import settings as evaluate_settings
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.load.settings import Load
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.paired import RESULT
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.request import Reference, Request
from lighten.evaluate.runtimes.choose import files_of, find_opener
from lighten.evaluate.runtimes.endpoint.connection import BUSY
from lighten.evaluate.runtimes.measurable import Served, find_all, find_measurable
from lighten.evaluate.serving.host import Host, Wanted, positions
from lighten.evaluate.serving.settings import Serve
from lighten.evaluate.settings import Evaluate
from lighten.evaluate.speed.settings import Speed
from lighten.model.accelerator import Device
from lighten.model.source import Found, Source
from lighten.pipeline.build import builder_of, check_options, choose_device
from lighten.pipeline.checks import arithmetic, check_measurable, check_memory, check_texts
from lighten.pipeline.plan import make_plan
from lighten.pipeline.predict import Predictor
from lighten.pipeline.recipe import Recipe, parse_settings
from lighten.pipeline.roofline import RooflineAndCost
from lighten.pipeline.rows import add_measurements, describe_source, label
from lighten.pipeline.served import in_servers
from lighten.pipeline.steps import checked, step_class
from lighten.pipeline.trust import check_tasks
from lighten.pipeline.watcher import Silent, Watcher
from lighten.process.isolate import run_isolated
from lighten.results.results import Results
from lighten.store.artifact import Artifact, read_artifact
from lighten.store.locks import scratch_beside
from lighten.store.names import distinct
from lighten.store.store import Store


def one_step(
    kind: str,
    model: str,
    out: str | Path,
    settings: dict[str, Any],
    *,
    calibration: dict[str, Any] | None = None,
    artifacts: str | Path = "artifacts",
    device: str = "auto",
    merge_adapter: bool = False,
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Runs one step on a model and leaves a copy of the artifact in `out`.

    The stages are kept in the store at `artifacts`, so that another step on the same model shares the sweep.
    `trust_remote_code` allows the code that comes with the named models.

    Raises:
        RequestError: a setting is wrong, or `out` already exists.
        Failure: the step failed.
    """
    target = Path(out)
    check_new(target)
    command = f"lighten {kind}"
    step = parse_settings(step_class(kind, settings), settings, command)
    swept = parse_settings(Sweep, calibration or {}, command)
    recipe = Recipe.of_one(step, model, swept, settings, merge_adapter=merge_adapter)
    if trust_remote_code:
        recipe = recipe.model_copy(update={"trust_remote_code": recipe.models})
    watcher = watcher or Silent()
    chosen = choose_device(device, watcher)
    todo = make_plan(recipe, device=chosen)
    check_memory(todo)
    store = Store(Path(artifacts))
    predictor = Predictor(store, chosen)
    watcher.planned(todo, {stage.key: predictor.predict(stage).seconds for stage in todo.stages})
    keys = [stage.key for stage in todo.stages]
    with store.lease(keys):
        builder = builder_of(todo, store, predictor, chosen.name, watcher, keys)
        for stage in todo.in_order:
            builder.build(stage)
        stage = todo.artifacts["result"]
        if stage.key in builder.failed:
            raise Failure(builder.failed[stage.key])
        return _copy_out(builder.done[stage.key], target)


def check_new(target: Path) -> None:
    """Raises RequestError if a directory cannot be made: it exists, or its parent cannot hold it."""
    if target.exists():
        raise RequestError(f"{target} exists already: choose another directory or remove it")
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise RequestError(f"{target} cannot be made, because {above} is a file: choose another directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RequestError(f"{target} cannot be made, because {above} cannot be written to: choose another directory")


def _copy_out(artifact: Artifact, target: Path) -> Artifact:
    """Copies an artifact to the place that the person asked for, under a temporary name first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(target) as folder:
        copy = folder / target.name
        shutil.copytree(artifact.path, copy, copy_function=shutil.copyfile)
        os.chmod(copy, 0o755)
        copy.rename(target)
    return read_artifact(target)


def quantize(model: str, out: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> Artifact:
    """Quantizes a model into the directory `out`: `quantize("demo:smollm2-135m", "out", method="gptq", bits=4)`."""
    return one_step("quantize", model, out, settings, trust_remote_code=trust_remote_code)


def polish(model: str, out: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> Artifact:
    """Trains the scales of a model that lighten quantized on its source into the directory `out`."""
    return one_step("polish", model, out, settings, trust_remote_code=trust_remote_code)


def prune(model: str, out: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> Artifact:
    """Prunes a model into the directory `out`: `prune("demo:smollm2-135m", "out", what="mlp", ratio=0.2)`."""
    return one_step("prune", model, out, settings, trust_remote_code=trust_remote_code)


def distill(model: str, out: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> Artifact:
    """Trains a model on its teacher into the directory `out`: `distill("pruned", "out", teacher="org/model")`."""
    return one_step("distill", model, out, settings, trust_remote_code=trust_remote_code)


def export_model(model: str, out: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> Artifact:
    """Exports a model into the directory `out`: `export_model(model, "out", format="gguf", type="Q4_K_M")`."""
    return one_step("export", model, out, settings, trust_remote_code=trust_remote_code)


def measure(
    paths: list[str],
    *,
    perplexity: Perplexity | list[Perplexity] | None = None,
    accuracy: list[Accuracy] | None = None,
    speed: Speed | None = None,
    load: Load | None = None,
    roofline: bool = False,
    price_per_hour: float | None = None,
    currency: str = "USD",
    device: str = "auto",
    merge_adapter: bool = False,
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
    trust_tasks: bool = False,
    usual: dict[str, Any] | None = None,
    serve: list[Serve] | None = None,
) -> dict[str, Any]:
    """Measures any model directories, .gguf or .onnx files, and servers (URLs). The first one is the baseline.

    If the first one is no causal language model, `usual` replaces the measurements by those that are usual for its
    task; it has their common settings, such as `data`.

    `trust_remote_code` allows the code that comes with the models, `trust_tasks` the code of lm-eval's task files.
    `serve` names servers that are started: each model has a second row, measured in the one that serves its files.

    Returns:
        The contents of a results.json, with one row per path and server. A path that fails is a row that says why.

    Raises:
        RequestError: a path is no model, or a server serves no such model.
        Failure: a server does not answer.
    """
    watcher = watcher or Silent()
    values: dict[str, Any] = {"perplexity": perplexity, "accuracy": accuracy or [], "speed": speed, "load": load}
    values |= {"roofline": roofline, "price_per_hour": price_per_hour, "currency": currency}
    settings = parse_settings(Evaluate, values, "lighten evaluate")
    check_tasks(settings.accuracy, trust_tasks)
    found = find_all(paths, watcher.say, trust_remote_code=trust_remote_code, merge_adapter=merge_adapter)
    if usual is not None and found[0].facts.task != "causal":
        settings = evaluate_settings.usual(found[0].facts.task, usual)
    for source in found:
        check_measurable(source.facts, settings, source.name)
        for note in source.notes:
            watcher.say(f"{source.name}: {note}")
    in_servers(found, serve or [])
    if readable := files_of(found[0].path):
        check_texts(readable, settings)
    for task in settings.accuracy:
        task.data_digest()
        task.prepare()
    chosen = choose_device(device, watcher)
    if any(find_opener(source.path)[0].takes_options for source in found):
        check_options(settings.speed, chosen.name)
    wanted = arithmetic(max(source.facts.params for source in found), chosen)
    rows: list[dict[str, Any]] = []
    roofline_and_cost = RooflineAndCost(settings, watcher)
    with tempfile.TemporaryDirectory(prefix="lighten-") as scratch, Host(None, watcher.say) as host:
        found = [
            _merged(source, Path(scratch) / f"merged-{n}", trust_remote_code, watcher) for n, source in enumerate(found)
        ]
        measuring = _Measuring(
            settings.asked, found[0], Path(scratch), chosen, wanted, trust_remote_code, watcher, host
        )
        todo = in_servers(found, serve or [])
        names = ["baseline", *distinct([label(*each) for each in todo[1:]], ["baseline"])]
        for number, ((source, server), name) in enumerate(zip(todo, names, strict=True)):
            rows.append(measuring.row(source, number, name, server))
            roofline_and_cost.add_to(rows[-1], source.path, source.facts)
    return _results(found[0], rows, roofline_and_cost)


def _results(
    baseline: Found | Served, rows: list[dict[str, Any]], roofline_and_cost: RooflineAndCost
) -> dict[str, Any]:
    size = rows[0]["size_bytes"]
    for row in rows[1:] if rows[0]["status"] == "ok" and size else []:
        if row["size_bytes"]:
            row.setdefault("delta", {})["size_ratio"] = row["size_bytes"] / size
    results = {
        "schema": 1,
        "recipe": "evaluate",
        "version": "",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**machine.fingerprint(), **roofline_and_cost.machine()},
        "source": {"model": baseline.name, "params": baseline.facts.params or None},
        "variants": rows,
        "stages": [],
        "recipe_yaml": "",
        "warnings": roofline_and_cost.warnings,
    }
    return Results.model_validate(results).model_dump(mode="json")


def _merged(source: Found | Served, out: Path, trusted: bool, watcher: Watcher) -> Found | Served:
    """Returns a source unchanged, or a directory with its adapter merged."""
    if isinstance(source, Served) or not source.adapter:
        return source
    watcher.say(f"merging {source.name}")
    settings = {
        "model": source.name,
        "path": str(source.path),
        "format": "directory",
        "identity": source.identity,
        "dtype": source.dtype,
        "surplus": source.surplus,
        "adapter": str(source.adapter),
        "trust_remote_code": trusted,
    }
    out.mkdir()
    step = checked(Source.model_validate(settings))
    payload: dict[str, Any] = {"step": step, "inputs": {}, "out": str(out), "scratch": None, "device": "cpu"}
    run_isolated("lighten.pipeline.steps:run_step", {**payload, "trust_remote_code": trusted})
    return replace(source, path=out, adapter=None)


@dataclass(frozen=True)
class _Measuring:
    """Measures one model after the other, each with its settings."""

    asked: list[Measurement]
    baseline: Found | Served
    scratch: Path
    device: Device
    arithmetic: str | None
    trusted: bool
    watcher: Watcher
    host: Host

    def row(self, source: Found | Served, number: int, name: str, serve: Serve | None = None) -> dict[str, Any]:
        """Returns the row of a model, which a server is started for if one is named; number 0 is the baseline."""
        is_baseline = number == 0
        row = {"name": name, "status": "ok", **describe_source(source)}
        measured: list[tuple[Measurement, Path, Path | None]] = []
        for note in row["notes"][len(source.notes) :]:  # earlier notes were said before
            self.watcher.say(f"{source.name}: {note}")
        wanted = self._wanted(source, name, serve) if serve else None
        try:
            for position, settings in enumerate(self.asked):
                out, base = self.scratch / f"{number}-{position}", self.scratch / f"0-{position}"
                value = self._measure(settings, source, out, None if is_baseline else base, wanted)
                if value.get("vocabulary") and not measured:
                    self.watcher.say(
                        f"{source.name} has another vocabulary than {self.baseline.name} ({value['vocabulary']}): each "
                        "is measured on its own tokens; compare bits per byte, not perplexity"
                    )
                paired = not is_baseline and (base / RESULT).is_file()  # its own row says why it was not measured
                measured.append((settings, out, base if paired else None))
            add_measurements(row, measured, is_baseline)
        except DiskFull:
            raise
        except LightenError as error:
            row |= {"status": "failed", "error": self.host.why(wanted, str(error)) if wanted else str(error)}
        return row

    def _wanted(self, source: Found | Served, name: str, serve: Serve) -> Wanted:
        longest = max((each.longest(source.facts.context) for each in self.asked), default=0)
        room = positions(source.facts.context, longest)
        return Wanted(find_opener(source.path)[1], name, serve, room, self.device.name)

    def _measure(
        self, settings: Measurement, source: Found | Served, out: Path, base: Path | None, wanted: Wanted | None
    ) -> dict[str, Any]:
        """Returns the result of a measurement, taken against that of the baseline at `base`; None for the baseline."""
        out.mkdir()
        first = self.baseline.path
        running = self.host.serving(wanted) if wanted else None
        refers = settings.refers and self.baseline.form == "directory" and isinstance(first, Path)
        request = Request(
            settings,
            model=str(running.address) if running else source.path,
            tokenizer=self.baseline.path,
            out=out,
            device=self.device.name,
            trust_remote_code=self.trusted,
            arithmetic=self.arithmetic,
            reference=Reference(base, first) if refers and base and isinstance(first, Path) else None,
            save_hidden=refers and base is None,
            server=running.facts if running else None,
        )
        self.watcher.say(f"{settings.title} of {source.name}" + (f" in {wanted.serve.program}" if wanted else ""))
        value: dict[str, Any] = run_isolated(
            "lighten.evaluate.run:measure", request.payload(), self._waits, fresh=settings.timed
        ).value
        return value

    def _waits(self, _done: int, _total: int, note: str) -> None:
        """Tells the person that a server has to be waited for."""
        if note.startswith(BUSY):
            self.watcher.say(note)


def profile(
    path: str,
    out: Path,
    *,
    prompt: int = 128,
    steps: int = 16,
    device: str = "auto",
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Profiles a model directory, a .gguf or an .onnx file as it is served. Leaves trace and summary in `out`.

    Returns:
        The contents of profile.json: seconds and operators of prefill and decoding, and the bottleneck of each.

    Raises:
        RequestError: the path is no model, or `out` already exists.
        Failure: the model does not run.
    """
    found = find_measurable(path, trust_remote_code=trust_remote_code)
    if found.facts.family != "causal":
        raise RequestError(f"{path} is no causal language model: there is no decoding to profile")
    check_new(out)
    out.mkdir(parents=True)
    payload = {
        "model": str(found.path),
        "out": str(out.resolve()),
        "device": choose_device(device).name,
        "prompt": prompt,
        "steps": steps,
        "trust_remote_code": trust_remote_code,
    }
    if watcher:
        watcher.say(f"profile of {found.name}")
    value: dict[str, Any] = run_isolated("lighten.evaluate.profiling:profile", payload, fresh=True).value
    return value
