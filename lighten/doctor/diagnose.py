"""Whether the calibration text of a recipe is the right one and is enough; and which loaders open a model."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lighten.compress.calibrate.sweep import Sweep
from lighten.data.origin import text_name
from lighten.data.text import load_text
from lighten.doctor import advice
from lighten.doctor.advice import Finding
from lighten.errors import Failure, RequestError
from lighten.evaluate.loaders import survey as loaders
from lighten.model.template import renderer
from lighten.pipeline import trust
from lighten.pipeline.build import Builder, builder_of, choose_device
from lighten.pipeline.plan import make_plan, stage_of
from lighten.pipeline.predict import Predictor
from lighten.pipeline.recipe import BASELINE, Recipe
from lighten.pipeline.run import open_recipe
from lighten.pipeline.served import without_servers
from lighten.pipeline.stage import Plan, Stage
from lighten.pipeline.watcher import Silent, Watcher
from lighten.process.isolate import run_isolated, share_cores
from lighten.step import Estimate, Report
from lighten.store.store import Store

PARTS = (0.25, 0.5)
"""Shares of the samples that are tried in addition to all samples."""

HELDOUT_SAMPLES = 16
SHORTEST = 8
"""Minimum number of tokens of a sample that a sweep takes."""


@dataclass(frozen=True)
class Diagnosis:
    """The findings about a recipe's calibration text, and their numbers."""

    recipe: str
    model: str
    findings: list[Finding]
    numbers: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Returns everything, for programs."""
        findings = [{**asdict(finding), "fine": not finding.advice} for finding in self.findings]
        return {"recipe": self.recipe, "model": self.model, "findings": findings, **self.numbers}


def diagnose(
    recipe: str | Recipe,
    *,
    artifacts: str | Path = "artifacts",
    device: str = "auto",
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
    trust_tasks: bool = False,
) -> Diagnosis:
    """Examines the calibration text of a recipe by the sweep that its variants use, and by smaller sweeps.

    The sweeps are stages of the store. A run of the recipe finds them there, and this function finds those of a run.

    Raises:
        RequestError: the recipe is wrong, or none of its variants uses calibration text.
        Failure: a sweep failed.
    """
    opened = without_servers(open_recipe(recipe, None))
    trust.check(opened, trust_remote_code=trust_remote_code, trust_tasks=trust_tasks)
    chosen = choose_device(device, watcher)
    todo = make_plan(opened, device=chosen)
    name, sweep = todo.recipe.name, todo.recipe.calibration
    if not any(stage.kind == Sweep.kind for stage in todo.stages):
        raise RequestError(
            f"no variant of {name} uses the calibration text, so there is nothing to examine; "
            "GPTQ does, and an export with imatrix: true"
        )
    perplexity = todo.recipe.evaluate.perplexity
    heldout = perplexity[0].data if perplexity else "builtin"
    with tempfile.TemporaryDirectory(prefix="lighten-") as folder, contextlib.ExitStack() as kept:
        examiner = _Examiner(todo, Store(Path(artifacts)), chosen.name, watcher or Silent(), kept)
        # a file, because a sweep of "builtin" reads the other half
        file = Path(folder) / "heldout.txt"
        file.write_text(load_text(heldout, "perplexity", renderer(todo.source.path)), encoding="utf-8")
        numbers = examiner.examine(file)
    calibration, inputs = numbers["calibration"], numbers["inputs"]
    findings = [
        advice.about_overlap(calibration),
        advice.about_text(calibration),
        advice.about_dead_channels(inputs),
        advice.about_rank(inputs, sweep.length),
        advice.about_loss(numbers["losses"], calibration, text_name(heldout)),
        advice.about_chat(numbers["chat"]),
    ]
    return Diagnosis(name, todo.recipe.model, findings, numbers)


def try_loaders(path: Path, *, device: str = "auto", watcher: Watcher | None = None) -> list[dict[str, Any]]:
    """Opens an artifact, a model directory or a .gguf file with every loader; returns what results.json calls loads.

    Raises:
        RequestError: nothing there that any loader would open.
    """
    watcher = watcher or Silent()
    stage = Stage("try every loader", "doctor", 1, "loaders", {}, [], Estimate())
    begin = time.monotonic()
    found = loaders.survey(path, device=choose_device(device).name, report=watcher.started(stage))
    watcher.ended(stage, time.monotonic() - begin, None)
    return found.loads


def examine_grams(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Calls `lighten.doctor.examination.examine`; the target of `lighten.process.isolate.run_isolated`."""
    share_cores()  # before torch is imported
    from lighten.doctor.examination import examine

    return examine(payload, report)


class _Examiner:
    """Builds the sweeps, and passes them to the processes that examine them."""

    def __init__(self, todo: Plan, store: Store, device: str, watcher: Watcher, kept: contextlib.ExitStack) -> None:
        self.todo = todo
        self.store = store
        self.device = device
        self.watcher = watcher
        self.kept = kept
        """Holds the leases of what was built until all of it has been looked at."""
        self.predictor = Predictor(store, todo.device)
        self.root = todo.artifacts[BASELINE]

    def examine(self, heldout: Path) -> dict[str, Any]:
        """Returns the numbers of every finding; `heldout` is a text file to judge the samples by."""
        recipe = self.todo.recipe
        whole = self._sweep(recipe.calibration, Sweep.kind)  # named as in a run, so that predictions learn from it
        source = self._build([self.root, whole]).done[self.root.key].path
        payload = {
            "model": str(source),
            "calibration": recipe.calibration.model_dump(mode="json"),
            "evaluate": recipe.evaluate.model_dump(mode="json"),
            "heldout": str(heldout),
        }
        read: dict[str, Any] = self._isolated("read the text", "lighten.pipeline.calibration:examine", payload)
        samples = read["calibration"]["samples"]
        counts = sorted({max(1, round(samples * part)) for part in PARTS} - {samples})
        parts = [(count, self._part(recipe.calibration, count)) for count in counts]
        judge = self._judge(heldout, read["heldout_tokens"])
        needed = [self.root, whole, *(stage for _, stage in parts), *([judge] if judge else [])]
        done = self._build(needed).done
        grams: dict[str, Any] = {
            "model": str(source),
            "grams": str(done[whole.key].path),
            "parts": [[count, str(done[stage.key].path)] for count, stage in [*parts, (samples, whole)]],
            "heldout": str(done[judge.key].path) if judge else None,
            "device": self.device,
        }
        seen: dict[str, Any] = self._isolated("examine the Grams", "lighten.doctor.diagnose:examine_grams", grams)
        return read | seen

    def _sweep(self, sweep: Sweep, name: str) -> Stage:
        stage = stage_of(
            sweep, {"source": self.root}, self.todo.source.facts, sweep.samples * sweep.length, self.todo.device
        )
        return replace(stage, name=name, variants=["doctor"])

    def _part(self, sweep: Sweep, samples: int) -> Stage:
        return self._sweep(sweep.model_copy(update={"samples": samples}), f"sweep of {samples} samples")

    def _judge(self, text: Path, tokens: int) -> Stage | None:
        """Returns the sweep over the held-out text; None if the text is too short."""
        length = min(self.todo.recipe.calibration.length, tokens)
        if length < SHORTEST:
            return None
        sweep = Sweep(data=str(text), samples=min(HELDOUT_SAMPLES, tokens // length), length=length)
        return self._sweep(sweep, "sweep of the held-out text")

    def _build(self, stages: list[Stage]) -> Builder:
        todo = replace(self.todo, stages=stages, measurements={})
        predicted = {stage.key: self.predictor.predict(stage).seconds for stage in stages}
        self.watcher.planned(todo, predicted)
        self.kept.enter_context(self.store.lease(stage.key for stage in stages))
        builder = builder_of(todo, self.store, self.predictor, self.device, self.watcher, list(predicted))
        for stage in todo.in_order:
            builder.build(stage)
        if builder.failed:
            raise Failure(next(iter(builder.failed.values())))
        return builder

    def _isolated(self, name: str, target: str, payload: dict[str, Any]) -> Any:
        stage = Stage(name, "doctor", 1, name, {}, [], Estimate())
        outcome = run_isolated(target, payload, self.watcher.started(stage))
        self.watcher.ended(stage, outcome.seconds, None)
        return outcome.value
