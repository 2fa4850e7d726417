"""From a recipe to stages: what is made from what, under which key, and at what predicted cost."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lighten.compress.calibrate.reads import Reads
from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.distill.teacher import Teacher
from lighten.data import text
from lighten.errors import RequestError, missing_extra
from lighten.evaluate.machine import this_machine
from lighten.evaluate.measurement import BYTES_PER_TOKEN, Measurement
from lighten.evaluate.runtimes.choose import opener
from lighten.evaluate.runtimes.endpoint.step import Endpoint
from lighten.evaluate.settings import Evaluate
from lighten.facts import TITLES, ModelFacts
from lighten.model import gguf_source, tokenizer_files, vocabulary
from lighten.model.accelerator import CPU, Device
from lighten.model.architectures import check_architecture
from lighten.model.checkpoint import read_config
from lighten.model.source import Found, GgufFile, Source, find
from lighten.model.tokens import check_text
from lighten.pipeline import lineage
from lighten.pipeline.checks import arithmetic, check_kernels, check_measurable
from lighten.pipeline.recipe import BASELINE, Recipe
from lighten.pipeline.served import Served, remote
from lighten.pipeline.stage import At, Plan, Stage, sources
from lighten.step import Step
from lighten.store.files import stage_key

MEASURE_VERSION = 1
UNQUANTIZED = "unquantized"
"""Teacher of a step that learns from the model that was quantized, on the calibration set."""


def stage_of(step: Step, inputs: dict[str, Stage], facts: ModelFacts, tokens: int, device: Device = CPU) -> Stage:
    """Returns the stage of a step on what its parents make, given by role.

    Of a model with the sizes `facts`; `tokens` are those of a sweep, for the estimate. What is computed on a GPU has
    a key of its own: its arithmetic is another.
    """
    config = step.key_config() | (device.key() if step.computes else {})
    parents = list(inputs.values())
    key = stage_key(step.kind, step.version, config, [parent.key for parent in parents])
    detail = next((found for name in ("method", "what", "type") if (found := getattr(step, name, None))), None)
    return Stage(
        f"{step.kind} {detail}" if detail else step.kind,
        step.kind,
        step.version,
        key,
        config,
        parents,
        step.predict(facts, tokens),
        step=step,
        roles=tuple(inputs),
        facts=step.result(facts),
        remarks=step.remarks(facts),
    )


def make_plan(recipe: Recipe, only: list[str] | None = None, device: Device = CPU) -> Plan:
    """Resolves a recipe into stages; the source is located (and fetched, if it is a hub id) but not read.

    Raises:
        RequestError: a setting that this model cannot have, a missing package, data that cannot be read.
    """
    source = find(
        recipe.model,
        recipe.revision,
        trust_remote_code=recipe.model in recipe.trusted,
        merge_adapter=recipe.merge_adapter,
    )
    check_measurable(source.facts, recipe.evaluate, recipe.model)
    chosen = [name for name in recipe.variants if name != BASELINE and (not only or name in only)]
    remotes = {name: found for name in chosen if (found := remote(recipe, name))}
    steps = {name: recipe.steps(name) for name in chosen if name not in remotes}
    builder = _Builder(recipe, device, source.facts)
    exact = {name for name in steps if steps[name] and steps[name][0].exact(source.facts)}
    changed = {name for name in steps if source.form == "gguf" and steps[name] and steps[name][0].keeps_form}
    if steps and changed == {*steps} and not recipe.evaluate.asked:
        root = builder.open_file(source)
    else:
        root = builder.open(source, exact=bool(steps) and exact == set(steps))
    served = Served(recipe, source.path)
    artifacts = {BASELINE: root}
    for name in chosen:
        if name in remotes:
            artifacts[name] = builder.add(served.stage(name, remotes[name]))
            continue
        stage = builder.open(source, exact=True) if name in exact else root
        stage = builder.open_file(source) if name in changed else stage
        for step in steps[name]:
            stage = builder.apply(step, stage, root)
        artifacts[name] = stage
    measurements: dict[str, list[Stage]] = {}
    places = {name: served.at(name, stage) for name, stage in artifacts.items()}
    builder.refers = places[BASELINE] is None
    for name, stage in artifacts.items():
        asked = _of_variant(recipe.evaluate, name, stage, places[name]).asked
        measurements[name] = [builder.measure(each, stage, root, places[name]) for each in asked if not each.pair]
    for each in recipe.evaluate.asked:
        if each.pair and (away := next((name for name in each.pair if name in remotes), None)):
            raise RequestError(f"evaluate.{each.name} needs the files of both models, and {away} is on a server")
        if each.pair and artifacts.keys() >= {*each.pair}:
            target, draft = each.pair
            # with the draft's: if it cannot draft, its row fails and not the target's
            measurements[draft].append(builder.measure_pair(each, artifacts[target], artifacts[draft]))
    for name, stage in artifacts.items():
        for used in (stage, *measurements[name]):
            used.user(name)
    for stage in builder.stages.values():
        if stage.measure:
            stage.name = f"{stage.name} of {stage.variants[0]}"
    for stage in builder.stages.values():
        _check_trust(stage)
    return Plan(recipe, source, list(builder.stages.values()), artifacts, measurements, device)


def _check_trust(stage: Stage) -> None:
    """Raises RequestError for a stage that opens one model whose code may run beside one whose code may not."""
    found = sources(stage)
    strangers = [each.model for each in found if not each.trust_remote_code]
    if strangers and len(strangers) < len(found):
        raise RequestError(
            f"{stage.name} opens {strangers[0]} beside a model whose own code may run: name both in the recipe's "
            "trust_remote_code, such as [org/one, org/other]"
        )


def _of_variant(evaluate: Evaluate, name: str, stage: Stage, at: At | None) -> Evaluate:
    """Returns the measurements of one variant, with its own options of speed if transformers runs it.

    Raises:
        RequestError: options for this very variant, which another runtime serves.
    """
    if not evaluate.speed:
        return evaluate
    shaped = stage.shaped.step
    takes = at is None and shaped is not None and opener(shaped.runtime).takes_options
    if not takes and name in evaluate.speed.options:
        raise RequestError(
            f"evaluate.speed.options.{name}: attention, compile and cache are options of transformers, and {name} is "
            "exported to another runtime: leave it out"
        )
    return evaluate.model_copy(update={"speed": evaluate.speed.of(name) if takes else evaluate.speed.plain})


def _tokenizer_of(stage: Stage) -> Path:
    """Returns the place of the source of a stage, whose tokenizer and template are passed on."""
    while not isinstance(stage.step, Source):
        stage = stage.parents[0]
    return Path(stage.step.path)


def _first(stage: Stage) -> Stage:
    """Returns the source of a stage's model."""
    while stage.parents:
        stage = stage.parents[0]
    return stage


def _origin(stage: Stage) -> Path | None:
    """Returns the directory that a stage's model has its tokenizer from; None if that was a GGUF file."""
    source = _first(stage).step
    return Path(source.path) if isinstance(source, Source) and source.format == "directory" else None


def _form(stage: Stage) -> str:
    """Returns the format of a stage's output."""
    assert stage.shaped.step
    return stage.shaped.step.writes


def _runtime_packages(stage: Stage) -> tuple[str, ...]:
    """Returns the packages of the runtime that serves a stage's output, if lighten does not bring that runtime."""
    return opener(stage.shaped.step.runtime).packages if stage.shaped.step else ()


class _Builder:
    """Makes each stage once."""

    def __init__(self, recipe: Recipe, device: Device, facts: ModelFacts) -> None:
        self.stages: dict[str, Stage] = {}
        self.refers = True
        """Whether measurements may refer to that of the baseline."""
        self._looked_at: set[tuple[Any, ...]] = set()
        self.recipe = recipe
        self.device = device
        self.arithmetic = arithmetic(facts.params, device)
        self.tokens = recipe.calibration.samples * recipe.calibration.length
        if recipe.calibration.data == "builtin":
            self.tokens = min(self.tokens, int(len(text.builtin_text("calibration")) / BYTES_PER_TOKEN))

    def add(self, stage: Stage) -> Stage:
        """Returns the stage; an equal one if there is one."""
        return self.stages.setdefault(stage.key, stage)

    def _build(self, step: Step, facts: ModelFacts, **inputs: Stage) -> Stage:
        return self.add(stage_of(step, inputs, facts, self.tokens, self.device))

    def open(self, found: Found, *, exact: bool = False) -> Stage:
        """Returns the stage of a source; an `exact` one keeps the type of its weights.

        Raises:
            RequestError: an ONNX directory, which can be measured but not changed.
        """
        if found.form == "onnx":
            raise RequestError(f"{found.name} is an ONNX directory: give the model that it was made from")
        facts = found.facts
        if found.form == "gguf":
            facts = gguf_source.check(found.path)
        elif (found.path / tokenizer_files.FILE).is_file():
            tokenizer_files.read_tokenizer(found.path)
        quantized = found.form == "directory" and read_config(found.path).get("quantization_config")
        step = Source(
            model=found.name,
            path=str(found.path),
            format="gguf" if found.form == "gguf" else "made" if found.form == "made" else "directory",
            identity=found.identity,
            trust_remote_code=found.name in self.recipe.trusted,
            dtype=found.dtype if exact and found.facts.family == "causal" and not quantized else None,
            surplus=found.surplus if found.facts.family == "causal" and not quantized else (),
            notes=found.notes,
            adapter=str(found.adapter) if found.adapter else None,
        )
        return self._build(step, facts)

    def open_file(self, found: Found) -> Stage:
        """Returns the stage of a GGUF file as it is, for a step that changes the file itself."""
        settings = {"model": found.name, "path": str(found.path), "format": "gguf", "identity": found.identity}
        trusted = found.name in self.recipe.trusted
        step = GgufFile.model_validate({**settings, "trust_remote_code": trusted})
        return self._build(step, gguf_source.check(found.path))

    def apply(self, step: Step, stage: Stage, root: Stage) -> Stage:
        """Returns the stage of a step on the output of another stage, with all its further inputs.

        Raises:
            RequestError: a setting that this model cannot have, a missing package, a teacher with another vocabulary.
        """
        if isinstance(student := getattr(step, "student", None), str):
            stage = self.open(find(student, trust_remote_code=student in self.recipe.trusted))
        assert stage.facts
        if stage.facts.task not in step.tasks:
            raise RequestError(
                f"the step {step.kind} reads {' or '.join(TITLES[task] for task in step.tasks)}, and "
                f"{stage.facts.architecture} is {TITLES[stage.facts.task]}: export it to ONNX instead (format: onnx)"
            )
        method = stage.step.quantized if isinstance(stage.step, Source) else None
        if method and not step.keeps_form and (step.kind != "export" or step.needs_sweep()):
            raise RequestError(
                f"this model is already quantized ({method}), which only an export without imatrix or budget reads: "
                "give the model that it was made from"
            )
        step = step.after(stage.step)
        assert stage.step
        form = _form(stage)
        step.check_source(form, stage.facts)
        if form != "hf" and step.needs_sweep():
            raise RequestError(f"the step {step.kind} needs inputs of unquantized weights, and this model is {form}")
        step.check(stage.facts)
        for module, extra in step.requires():
            if find_spec(module) is None:
                raise missing_extra(extra, module, f"the step {step.kind}")
        self._check_files(step, stage, stage.facts)
        if step.needs_sweep() and not step.any_family and not self.recipe.trust_remote_code:
            check_architecture(stage.facts.architecture)
        inputs = {"source": stage}
        if step.needs_sweep():
            swept = self.recipe.calibration
            check_text(_tokenizer_of(stage), swept.data, "calibration", swept.length, swept.samples)
            if not step.needs_sums():
                swept = Reads(**swept.model_dump())
            inputs["grams"] = self._build(swept, stage.facts, source=stage)
        if step.needs_sensitivity():
            sensitivities = Sensitivities(**self.recipe.calibration.model_dump())
            inputs["sensitivity"] = self._build(sensitivities, stage.facts, source=stage)
        if lessons := step.lessons():
            inputs |= self._taught(step, lessons, stage, root)
        return self._build(step, stage.facts, **inputs)

    def _check_files(self, step: Step, stage: Stage, facts: ModelFacts) -> None:
        """Raises RequestError for files that a step cannot read in its model's directory; checks each kind once."""
        origin = _origin(stage)
        reads = step.needs_sweep() or step.lessons() is not None
        asked = (step.kind, getattr(step, "format", None), reads, origin)
        if origin is None or asked in self._looked_at:
            return
        if reads:
            tokenizer_files.read_tokenizer(origin)
        step.check_files(origin, facts)
        self._looked_at.add(asked)

    def _taught(self, step: Step, lessons: Step, stage: Stage, root: Stage) -> dict[str, Stage]:
        """Returns the teacher of a step on the output of `stage`, and the stage of its distributions."""
        name = getattr(step, "teacher", "source")
        if name == UNQUANTIZED:
            teacher, swept = self._unquantized(stage), self.recipe.calibration
            lessons = lessons.model_copy(update={each: getattr(swept, each) for each in ("data", "samples", "length")})
        else:
            teacher = root if name == "source" else self.open(find(name, trust_remote_code=name in self.recipe.trusted))
        assert teacher.facts and stage.facts
        student = stage.facts
        origins = [_first(each).step for each in (stage, teacher)]
        paths = [Path(each.path) for each in origins if isinstance(each, Source)]
        if paths[0] != paths[1] and (other := vocabulary.differing(*paths)):
            raise RequestError(
                f"the student and its teacher {name} have different vocabularies ({other}): distillation compares "
                "token by token, so take a teacher with the same vocabulary"
            )
        if isinstance(lessons, Teacher):
            check_text(_tokenizer_of(teacher), lessons.data, "calibration", lessons.length, lessons.samples)
            if teacher.facts.vocab > student.vocab:  # rows that only pad the teacher's
                lessons = lessons.model_copy(update={"rows": student.vocab})
        return {"teacher": teacher, "lessons": self._build(lessons, teacher.facts, source=teacher)}

    def _unquantized(self, stage: Stage) -> Stage:
        """Returns the model that stages quantized, or that a directory or file of ours was quantized from.

        Raises:
            RequestError: what is there is not as lighten wrote it, or its source is not there any more.
        """
        while not isinstance(stage.step, Source):
            stage = stage.parents[0]
            if _form(stage) == "hf":
                return stage
        made = lineage.read(Path(stage.step.path))
        source = self.open(find(made.model, made.revision, trust_remote_code=made.model in self.recipe.trusted))
        made.check(source.key)
        return source

    def measure(self, settings: Measurement, stage: Stage, root: Stage, at: At | None = None) -> Stage:
        """Returns a measurement of an artifact. It may refer to the baseline's own measurement, if both are here."""
        inputs = {"model": stage}
        if not (settings.over_http or isinstance(stage.step, Endpoint)):
            at = None
        if settings.of_quality:
            inputs["tokenizer"] = root
        if at is None and settings.timed:
            check_kernels(settings, stage, _origin(stage))
        if settings.refers and stage is not root and self.refers and at is None:
            inputs["reference"] = self.measure(settings, root, root)
        return self._measurement(settings, inputs, at)

    def measure_pair(self, settings: Measurement, target: Stage, draft: Stage) -> Stage:
        """Returns the measurement of a target with its draft."""
        return self._measurement(settings, {"model": target, "draft": draft})

    def _measurement(self, settings: Measurement, inputs: dict[str, Stage], at: At | None = None) -> Stage:
        parents, data = list(inputs.values()), settings.data_digest()
        config: dict[str, Any] = {
            "measure": settings.name,
            **settings.key_config(),
            "packages": settings.packages(_runtime_packages(parents[0])),
            **settings.key_facts(),
        }
        if data and len(parents) > 1 and _first(parents[0]) is not _first(parents[1]):
            config["vocabulary"] = "compared"  # a student from elsewhere may have another one than the baseline
        if data:
            config["data"] = data
        if settings.timed:
            config["machine"] = this_machine()
        if at:
            config["server"] = at.key
        config |= self.device.key()
        asked = self.arithmetic if settings.of_quality else None
        if asked:
            config["arithmetic"] = asked
        facts = parents[0].facts
        assert facts
        return self.add(
            Stage(
                settings.title,
                "measure",
                MEASURE_VERSION,
                stage_key("measure", MEASURE_VERSION, config, [parent.key for parent in parents]),
                config,
                parents,
                settings.predict(facts),
                settings=settings,
                roles=tuple(inputs),
                arithmetic=asked,
                at=at,
            )
        )
