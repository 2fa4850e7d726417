"""Builds the stages of a plan."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from lighten.errors import DiskFull, Failure, LightenError, RequestError
from lighten.evaluate import machine
from lighten.evaluate.machine import measuring_packages, this_machine
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.paired import RESULT
from lighten.evaluate.parity.check import check
from lighten.evaluate.request import Reference, Request
from lighten.evaluate.run import measure_here
from lighten.evaluate.runtimes.endpoint.step import Endpoint
from lighten.evaluate.serving.host import Host, Wanted
from lighten.evaluate.speed.options import lacking
from lighten.evaluate.speed.settings import Speed
from lighten.model.accelerator import Device, resolve
from lighten.model.source import Source
from lighten.pipeline.predict import Predictor, cost_class
from lighten.pipeline.served import wanted
from lighten.pipeline.stage import Plan, Stage, trusted
from lighten.pipeline.steps import checked
from lighten.pipeline.watcher import Watcher
from lighten.process.isolate import Outcome, run_isolated
from lighten.step import Report
from lighten.store.artifact import Artifact
from lighten.store.store import Store, write_json


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
        host: Host | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self.watcher = watcher
        self.predictor = predictor
        self.source = source
        self.fatal = fatal
        """Keys of stages whose failure ends the command. The command says why, so the watcher need not."""
        self.host = host
        """Starts the servers that measurements need; None if there are none."""
        self.names: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.done: dict[str, Artifact] = {}
        self.cached: set[str] = set()

    def build(self, stage: Stage) -> Artifact | None:
        """Returns the object of a stage, and builds it if the store has no sound one; None if that failed."""
        self.names[stage.key] = stage.step.model if isinstance(stage.step, Source) else stage.name
        broken = next((parent for parent in stage.parents if parent.key in self.failed), None)
        if broken:
            self.failed[stage.key] = f"needs {broken.name}, which failed: {self.failed[broken.key]}"
            return None
        with self._noting_failure(stage), self._locked(stage):
            artifact = self.store.sound(stage.key, lambda damage: self.watcher.say(f"{stage.name}: {damage}"))
            if artifact:
                self.cached.add(stage.key)
                self.watcher.ended(stage, None, None)
            else:
                report = self.watcher.started(stage)
                with self.store.building(stage.key) as out:
                    outcome = self._without_process(stage, out, report)
                    if outcome is None:
                        with self._over_http(stage):
                            target, payload = self._task(stage, out)
                            timed = stage.settings is not None and stage.settings.timed
                            outcome = run_isolated(target, payload, report, fresh=timed)
                    artifact = self._finish(stage, out, self._compared(stage, out, outcome, report))
            self.done[stage.key] = artifact
        return self.done.get(stage.key)

    def _without_process(self, stage: Stage, out: Path, report: Report) -> Outcome | None:
        """Measures what needs no process of its own; None for all other stages."""
        if stage.settings and stage.at and not stage.settings.over_http:
            return self._out_of_reach(stage, out)
        if stage.settings and not stage.settings.isolated:
            return self._measured_here(stage, out, report)
        return None

    @contextlib.contextmanager
    def _over_http(self, stage: Stage) -> Iterator[None]:
        """Says of a failed measurement on a server whether the server has ended. A refusal there is a failed row."""
        try:
            yield
        except DiskFull:
            raise
        except LightenError as error:
            if stage.at is None:
                raise
            serves = self.host if stage.at.serve else None
            raise Failure(serves.why(self._wanted(stage), str(error)) if serves else str(error)) from error

    def _out_of_reach(self, stage: Stage, out: Path) -> Outcome:
        """Writes the result of a measurement that needs the files of a model on a server."""
        assert stage.settings
        lack = f"{stage.settings.name} needs the files of a model, and this one is on a server"
        found = {"unavailable": lack, "runtime": "endpoint", "device": "server", "warnings": []}
        write_json(out / RESULT, {"measurement": stage.measure, **found})
        return Outcome(found, 0.0, 0)

    def _wanted(self, stage: Stage) -> Wanted:
        assert stage.at
        return wanted(stage.at, self.done[stage.parents[0].key].path, stage.variants[0], self.device)

    @contextlib.contextmanager
    def _noting_failure(self, stage: Stage) -> Iterator[None]:
        """Notes why a stage failed. A wrong request and a full disk end the command."""
        try:
            yield
        except DiskFull:
            raise
        except RequestError as error:
            raise RequestError(self.in_words(str(error))) from error
        except LightenError as error:
            self.failed[stage.key] = self.in_words(str(error))
            self.watcher.ended(stage, None, "failed" if stage.key in self.fatal else self.failed[stage.key])

    def in_words(self, message: str) -> str:
        """Returns a message with the names of models and stages in place of their places in the store."""
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

    def _finish(self, stage: Stage, out: Path, outcome: Outcome) -> Artifact:
        """Puts the output of a stage into the store, with its cost."""
        facts = dict(outcome.value)
        warnings = [self.in_words(warning) for warning in facts.pop("warnings", [])]
        origin = stage.parents[0].key if stage.parents else None
        inherited = self.done[origin].manifest["source"] if origin else {}
        source = {"id": facts["address"]} if isinstance(stage.step, Endpoint) else self.source
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
            "source": {
                **source,
                **_named(stage),
                **inherited,
                **({"licence": facts["licence"]} if "licence" in facts else {}),
            },
        }
        artifact = self.store.finish(out, manifest)
        self.store.drop_scratch(stage.key)
        cost = {
            "what": cost_class(stage),
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

    def _measured_here(self, stage: Stage, out: Path, report: Report) -> Outcome:
        """Runs a measurement that starts its own processes. Its messages name stages instead of places."""
        outcome = measure_here(self._request(stage, out), report)
        found = each_text(outcome.value, self.in_words)
        write_json(out / RESULT, {"measurement": stage.measure, **found})
        return Outcome(found, outcome.seconds, outcome.peak_rss_bytes)

    def _compared(self, stage: Stage, out: Path, outcome: Outcome, report: Report) -> Outcome:
        """Returns the outcome; that of an export, or of what changed its files, with a comparison with its source.

        Raises:
            Failure: it is no longer the same model.
        """
        shaped = stage.shaped
        promised = shaped.step.promises() if shaped.step else None
        if not promised:
            return outcome
        made = out / str(outcome.value["file"]) if "file" in outcome.value else out
        payload = {
            "source": str(self.done[shaped.parents[0].key].path),
            "made": str(made),
            "trust_remote_code": trusted(stage),
            **promised,
        }
        found = check(payload, report)
        value = {**outcome.value, **found.value, "warnings": outcome.value["warnings"] + found.value["warnings"]}
        peak = max(outcome.peak_rss_bytes, found.peak_rss_bytes)
        return Outcome(value, outcome.seconds + found.seconds, peak)

    def _task(self, stage: Stage, out: Path) -> tuple[str, dict[str, Any]]:
        if stage.settings:
            return "lighten.evaluate.run:measure", self._request(stage, out).payload()
        assert stage.step is not None
        return "lighten.pipeline.steps:run_step", {
            "step": checked(stage.step),
            "inputs": {role: str(path) for role, path in self._inputs(stage).items()},
            "scratch": str(self.store.scratch(stage.key)) if stage.step.lessons() else None,
            "out": str(out),
            "key": stage.key,
            "device": self.device,
            "trust_remote_code": trusted(stage),
        }

    def _inputs(self, stage: Stage) -> dict[str, Path]:
        return {role: self.done[each.key].path for role, each in zip(stage.roles, stage.parents, strict=True)}

    def _request(self, stage: Stage, out: Path) -> Request[Measurement]:
        assert stage.settings
        paths, facts, server = self._inputs(stage), stage.parents[0].facts, None
        model: Path | str = paths["model"]
        if stage.at and stage.at.serve:
            assert self.host
            running = self.host.serving(self._wanted(stage))
            model, server = str(running.address), running.facts
        elif stage.at:
            model = stage.at.address
        reference = Reference(paths["reference"], paths["tokenizer"]) if "reference" in paths else None
        return Request(
            stage.settings,
            model=model,
            tokenizer=paths.get("tokenizer", paths["model"]),
            out=out,
            device=self.device,
            trust_remote_code=trusted(stage),
            draft=paths.get("draft"),
            arithmetic=stage.arithmetic,
            reference=reference,
            save_hidden=stage.settings.refers and reference is None and stage.at is None,
            vocab=facts.vocab if facts and stage.at is None else None,
            server=server,
        )


def _named(stage: Stage) -> dict[str, Any]:
    """Returns the name of a source that is not the recipe's own, such as what a directory was quantized from."""
    step = stage.step
    return {"id": step.model, "identity": step.identity} if isinstance(step, Source) else {}


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Returns JSON in which every text is changed; names of fields stay."""
    if isinstance(value, dict):
        return {name: each_text(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [each_text(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def choose_device(device: str, watcher: Watcher | None = None) -> Device:
    """Returns the device of a name, which torch confirms. "auto" is a GPU if torch can use one.

    Raises:
        RequestError: the device does not exist, or torch cannot use it.
    """
    found = resolve(device, gpus=bool(machine.fingerprint()["gpus"]))
    if found.note and watcher:
        watcher.say(found.note)
    return found


def check_options(speed: Speed | None, device: str) -> None:
    """Raises RequestError for options that this machine lacks. Those of a single variant may fail later."""
    if speed and (lack := lacking(speed, device)):
        raise RequestError(lack)


def builder_of(
    todo: Plan,
    store: Store,
    predictor: Predictor,
    device: str,
    watcher: Watcher,
    fatal: Collection[str] = (),
    host: Host | None = None,
) -> Builder:
    """Returns the builder of a plan's stages. Call it for each of them `in_order`, while the store has their lease.

    The caller reports the failure of a `fatal` one.
    """
    source = {"id": todo.source.name, "revision": todo.recipe.revision, "identity": todo.source.identity}
    return Builder(store, predictor, device, watcher, source, fatal, host)
