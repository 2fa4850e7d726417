"""From a recipe to stages: what is made from what, under which key, at what predicted cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.distill.teacher import Teacher
from lighten.data import choices, text
from lighten.errors import RequestError, missing_extra
from lighten.evaluate import machine
from lighten.evaluate.accuracy import harness
from lighten.evaluate.loaders import survey as loaders
from lighten.evaluate.perplexity.protocols import check_length
from lighten.evaluate.settings import Accuracy, Evaluate, Load, Loaders, Perplexity, Speculative, Speed
from lighten.model import gguf_source, llama_library, tokenizer_files, vocabulary
from lighten.model.accelerator import CPU, Device
from lighten.model.architectures import check_architecture
from lighten.model.checkpoint import read_config
from lighten.model.source import Found, Source, find
from lighten.model.tokens import check_text
from lighten.pipeline.recipe import BASELINE, Recipe
from lighten.step import Estimate, ModelFacts, Step
from lighten.store.store import Store, stage_key

Measure = Literal["perplexity", "accuracy", "speed", "load", "speculative", "loaders"]
Settings = Perplexity | Accuracy | Speed | Load | Speculative | Loaders
TIMED: tuple[Measure, ...] = ("speed", "load", "speculative")
"""What depends on the machine, and on what else it does."""
MEASURE_VERSION = 1
MEASURING_PACKAGES = ("torch", "transformers", "gptqmodel", "onnxruntime", "onnxruntime-genai")
GPU_FLOPS = 150e12, 30e12
"""Operations per second that a large GPU reaches in bfloat16 and in float32, before anything was measured here."""
BYTES_PER_TOKEN = 4.0
"""Rough length of a token of English text, for predictions."""


@dataclass
class Stage:
    """A step or a measurement with its inputs resolved."""

    name: str
    kind: str
    version: int
    key: str
    config: dict[str, Any]
    """What the key was made of, together with kind, version and the parents' keys."""
    parents: list[Stage]
    estimate: Estimate
    step: Step | None = None
    measure: Measure | None = None
    settings: Settings | None = None
    variants: list[str] = field(default_factory=list)
    roles: tuple[str, ...] = ()
    """What each parent is to the step: source, grams, …"""
    facts: ModelFacts | None = None
    """Sizes of the model that it leaves, as far as they are known before."""
    arithmetic: str | None = None
    """What quality is measured in, where the device leaves a choice."""

    def user(self, variant: str) -> None:
        """Notes that a variant needs this stage and everything it is made from."""
        for stage in (self, *self.parents):
            if variant not in stage.variants:
                stage.variants.append(variant)
            if stage is not self:
                stage.user(variant)


@dataclass
class Plan:
    """Every stage of a recipe, each after the ones it needs."""

    recipe: Recipe
    source: Found
    stages: list[Stage]
    artifacts: dict[str, Stage]
    """The last stage of every variant."""
    measurements: dict[str, list[Stage]]
    """Measurements of every variant."""
    device: Device = CPU
    """What it is planned for."""


@dataclass(frozen=True)
class Prediction:
    """What a stage should take on this machine."""

    seconds: float
    peak_bytes: int
    disk_bytes: int


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
    steps = {name: recipe.steps(name) for name in chosen}
    builder = _Builder(recipe, device, source.facts)
    exact = {name for name in chosen if steps[name] and steps[name][0].exact(source.facts)}
    root = builder.open(source, exact=bool(chosen) and exact == set(chosen))
    artifacts = {BASELINE: root}
    for name in chosen:
        stage = builder.open(source, exact=True) if name in exact else root
        for step in steps[name]:
            stage = builder.apply(step, stage, root)
        artifacts[name] = stage
    measurements: dict[str, list[Stage]] = {}
    for name, stage in artifacts.items():
        measurements[name] = builder.measure(stage, root, _of_variant(recipe.evaluate, name, stage))
    if (asked := recipe.evaluate.speculative) and {asked.draft, asked.target} <= artifacts.keys():
        # with the draft's: if it cannot draft, its row fails and not the target's
        measurements[asked.draft].append(builder.speculate(asked, artifacts))
    for name, stage in artifacts.items():
        for each in (stage, *measurements[name]):
            each.user(name)
    for stage in builder.stages.values():
        if stage.measure:
            stage.name = f"{stage.name} of {stage.variants[0]}"
    for stage in builder.stages.values():
        _check_trust(stage)
    return Plan(recipe, source, list(builder.stages.values()), artifacts, measurements, device)


def sources(stage: Stage) -> list[Source]:
    """Returns the models that a stage is made from."""
    waiting, seen = [stage], {stage.key: stage}
    while waiting:
        for parent in waiting.pop().parents:
            if parent.key not in seen:
                seen[parent.key] = parent
                waiting.append(parent)
    return [each.step for each in seen.values() if isinstance(each.step, Source)]


def trusted(stage: Stage) -> bool:
    """Returns whether code that comes with a model may run in a stage: it has to be granted to all that it opens."""
    found = sources(stage)
    return bool(found) and all(each.trust_remote_code for each in found)


def _check_trust(stage: Stage) -> None:
    """Raises RequestError for a stage that opens one model whose code may run beside one whose code may not."""
    found = sources(stage)
    strangers = [each.model for each in found if not each.trust_remote_code]
    if strangers and len(strangers) < len(found):
        raise RequestError(
            f"{stage.name} opens {strangers[0]} beside a model whose own code may run: name both in the recipe's "
            "trust_remote_code, such as [org/one, org/other]"
        )


def _of_variant(evaluate: Evaluate, name: str, stage: Stage) -> Evaluate:
    """Returns what to measure of one variant: with its own options of speed, if transformers runs it.

    Raises:
        RequestError: options for this very variant, which another runtime serves.
    """
    if not evaluate.speed:
        return evaluate
    exported = stage.kind == "export"
    if exported and name in evaluate.speed.options:
        raise RequestError(
            f"evaluate.speed.options.{name}: attention, compile and cache are options of transformers, and {name} is "
            "exported to another runtime: leave it out"
        )
    return evaluate.model_copy(update={"speed": evaluate.speed.plain if exported else evaluate.speed.of(name)})


def check_measurable(facts: ModelFacts, evaluate: Evaluate, name: str) -> None:
    """Raises RequestError if something is to be measured that the model has not, or if it takes fewer positions."""
    wanted = [name for name in ("perplexity", "accuracy", *TIMED) if getattr(evaluate, name)]
    if facts.family != "causal" and wanted:
        raise RequestError(
            f"{facts.architecture} is no causal language model: {', '.join(wanted)} cannot be measured on it, "
            "only its size (evaluate: {}, or --skip each of them)"
        )
    for perplexity in evaluate.perplexity:
        check_length(perplexity, facts.context, name)
    if evaluate.speed:
        check_room("speed", max(evaluate.speed.prompt), evaluate.speed.generate, facts.context, name)
    for what, asked in (("load", evaluate.load), ("speculative", evaluate.speculative)):
        if asked:
            check_room(what, asked.prompt, asked.generate, facts.context, name)


def check_texts(model: Path, evaluate: Evaluate) -> None:
    """Raises RequestError or Failure if a model cannot be given what is to be measured on; before any work."""
    for perplexity in evaluate.perplexity:
        least = 1 if perplexity.protocol == "lm-eval" else perplexity.length or 1
        check_text(model, perplexity.data, "perplexity", least)
    for asked in (evaluate.load, evaluate.speculative):
        if asked:
            check_text(model, asked.data, "perplexity", asked.prompt)


def _tokenizer_of(stage: Stage) -> Path:
    """Returns where the source lies that a stage goes back to: its tokenizer and template are handed on."""
    while not isinstance(stage.step, Source):
        stage = stage.parents[0]
    return Path(stage.step.path)


def check_room(what: str, prompt: int, generate: int, context: int | None, name: str) -> None:
    """Raises RequestError if a prompt and what follows it are longer than the model's context."""
    if context and prompt + generate > context:
        raise RequestError(
            f"{what}: {prompt} prompt and {generate} generated tokens are more than the {context} positions "
            f"that {name} takes: set a smaller `prompt` or `generate`"
        )


def _first(stage: Stage) -> Stage:
    """Returns the source that a stage's model comes from."""
    while stage.parents:
        stage = stage.parents[0]
    return stage


def _origin(stage: Stage) -> Path | None:
    """Returns the directory that a stage's model has its tokenizer from; None if that was a GGUF file."""
    source = _first(stage).step
    return Path(source.path) if isinstance(source, Source) and source.format == "directory" else None


class _Builder:
    """Makes each stage once."""

    def __init__(self, recipe: Recipe, device: Device, facts: ModelFacts) -> None:
        self.stages: dict[str, Stage] = {}
        self._looked_at: set[tuple[Any, ...]] = set()
        self.recipe = recipe
        self.device = device
        self.arithmetic = arithmetic(facts.params, device)
        self.tokens = recipe.calibration.samples * recipe.calibration.length
        if recipe.calibration.data == "builtin":
            self.tokens = min(self.tokens, int(len(text.builtin_text("calibration")) / BYTES_PER_TOKEN))

    def _add(self, stage: Stage) -> Stage:
        return self.stages.setdefault(stage.key, stage)

    def _build(self, step: Step, facts: ModelFacts, **inputs: Stage) -> Stage:
        return self._add(stage_of(step, inputs, facts, self.tokens, self.device))

    def open(self, found: Found, *, exact: bool = False) -> Stage:
        """Returns the stage of a source; an `exact` one keeps the type of its weights.

        Raises:
            RequestError: an ONNX directory, which can be measured but not changed.
        """
        if found.kind == "onnx":
            raise RequestError(f"{found.name} is an ONNX directory: give the model that it was made from")
        facts = found.facts
        if found.kind == "gguf":
            facts = gguf_source.check(found.path)
        elif (found.path / tokenizer_files.FILE).is_file():
            tokenizer_files.read_tokenizer(found.path)
        quantized = found.kind == "directory" and read_config(found.path).get("quantization_config")
        step = Source(
            model=found.name,
            path=str(found.path),
            format=found.kind,
            identity=found.identity,
            trust_remote_code=found.name in self.recipe.trusted,
            dtype=found.dtype if exact and found.facts.family == "causal" and not quantized else None,
            surplus=found.surplus if found.facts.family == "causal" and not quantized else (),
            notes=found.notes,
            adapter=str(found.adapter) if found.adapter else None,
        )
        return self._build(step, facts)

    def apply(self, step: Step, stage: Stage, root: Stage) -> Stage:
        """Returns the stage of a step on what another one leaves, with all that it needs besides.

        Raises:
            RequestError: a setting that this model cannot have, a missing package, a teacher of other vocabulary.
        """
        if isinstance(student := getattr(step, "student", None), str):
            stage = self.open(find(student, trust_remote_code=student in self.recipe.trusted))
        assert stage.facts
        if step.causal_only and stage.facts.family != "causal":
            raise RequestError(
                f"the step {step.kind} reads causal language models, {stage.facts.architecture} is none: "
                "export it to ONNX instead (format: onnx)"
            )
        method = stage.step.quantized if isinstance(stage.step, Source) else None
        if method and (step.kind != "export" or step.needs_sweep()):
            raise RequestError(
                f"this model is already quantized ({method}), which only an export without imatrix or budget reads: "
                "give the model that it was made from"
            )
        step = step.after(stage.step)
        assert stage.step
        form = stage.step.writes
        step.check_source(form, stage.facts)
        if form != "hf" and step.needs_sweep():
            raise RequestError(f"the step {step.kind} needs inputs of unquantized weights, and this model is {form}")
        step.check(stage.facts)
        for module, extra in step.requires():
            if find_spec(module) is None:
                raise missing_extra(extra, module, f"the step {step.kind}")
        self._check_files(step, stage, stage.facts)
        if step.needs_sweep() and not self.recipe.trust_remote_code:
            check_architecture(stage.facts.architecture)
        inputs = {"source": stage}
        if step.needs_sweep():
            swept = self.recipe.calibration
            check_text(_tokenizer_of(stage), swept.data, "calibration", swept.length, swept.samples)
            inputs["grams"] = self._build(self.recipe.calibration, stage.facts, source=stage)
        if step.needs_sensitivity():
            sensitivities = Sensitivities(**self.recipe.calibration.model_dump())
            inputs["sensitivity"] = self._build(sensitivities, stage.facts, source=stage)
        if lessons := step.lessons():
            inputs |= self._taught(step, lessons, stage, root)
        return self._build(step, stage.facts, **inputs)

    def _check_files(self, step: Step, stage: Stage, facts: ModelFacts) -> None:
        """Raises RequestError for what a step cannot read where its model comes from; looks once for each kind."""
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
        """Returns the teacher of a step on what `stage` leaves, and what it says about the text."""
        name = getattr(step, "teacher", "source")
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

    def measure(self, stage: Stage, root: Stage, evaluate: Evaluate) -> list[Stage]:
        """Returns the measurements of an artifact; those of other artifacts than the baseline refer to its own."""
        found = []
        for perplexity in evaluate.perplexity:
            reference = [] if stage is root else self.measure(root, root, Evaluate(perplexity=[perplexity]))
            data = _identity(perplexity)
            found.append(self._measurement("perplexity", perplexity, data, [stage, root, *reference]))
        for accuracy in evaluate.accuracy:
            found.append(self._measurement("accuracy", accuracy, look(accuracy).digest, [stage, root]))
        if evaluate.speed:
            found.append(self._measurement("speed", evaluate.speed, None, [stage]))
        if evaluate.load:
            found.append(
                self._measurement("load", evaluate.load, text.identity(evaluate.load.data, "perplexity"), [stage])
            )
        if evaluate.loaders:
            found.append(self._measurement("loaders", Loaders(), None, [stage]))
        return found

    def speculate(self, asked: Speculative, artifacts: dict[str, Stage]) -> Stage:
        """Returns the measurement of a target with its draft."""
        parents = [artifacts[asked.target], artifacts[asked.draft]]
        return self._measurement("speculative", asked, text.identity(asked.data, "perplexity"), parents)

    def _measurement(self, measure: Measure, settings: Settings, data: str | None, parents: list[Stage]) -> Stage:
        config: dict[str, Any] = {
            "measure": measure,
            **settings.key_config(),
            "packages": loaders.packages() if measure == "loaders" else measuring_packages(),
        }
        if data and len(parents) > 1 and _first(parents[0]) is not _first(parents[1]):
            config["vocabulary"] = "compared"  # a student from elsewhere may have another one than the baseline
        if isinstance(settings, Accuracy) and settings.harness:
            config["lm_eval"] = harness.look(settings).version
        if data:
            config["data"] = data
        if measure in TIMED:
            config["machine"] = this_machine()
        config |= self.device.key()
        asked = self.arithmetic if measure in ("perplexity", "accuracy") else None
        if asked:
            config["arithmetic"] = asked
        key = stage_key("measure", MEASURE_VERSION, config, [parent.key for parent in parents])
        facts = parents[0].facts
        assert facts
        estimate = predict_measurement(settings, facts)
        return self._add(
            Stage(
                settings.told,
                "measure",
                MEASURE_VERSION,
                key,
                config,
                parents,
                estimate,
                measure=measure,
                settings=settings,
                arithmetic=asked,
            )
        )


def arithmetic(params: int, device: Device) -> str | None:
    """Returns what quality is measured in on a GPU, the same for all variants: float32 where the source fits.

    None on the processor, where it is always float32.
    """
    if device.name == "cpu":
        return None
    return "float32" if device.holds(1.5 * 4 * params) else "bfloat16"


def device_bytes(stage: Stage) -> int:
    """Returns about what a stage takes of a GPU's memory; 0 for one that computes elsewhere."""
    facts = stage.parents[0].facts if stage.parents else None
    if stage.step and not stage.step.computes:
        return 0
    if stage.measure is None or facts is None:
        return stage.estimate.peak_bytes
    wide = 4 if stage.arithmetic == "float32" else 2
    exported = stage.parents[0].kind == "export"
    return 0 if exported or stage.measure == "loaders" else int(wide * facts.params + 4 * 2048 * facts.vocab)


def check_memory(todo: Plan) -> None:
    """Raises RequestError if a stage needs more memory than the GPU has."""
    for stage in todo.stages:
        needed = device_bytes(stage)
        if not todo.device.holds(needed):
            assert todo.device.total_bytes
            raise RequestError(
                f"{stage.name} needs about {needed / 1e9:.0f} GB, and {todo.device.name} ({todo.device.title}) has "
                f"{todo.device.total_bytes / 1e9:.0f} GB: take --device cpu, or ask for less (a smaller batch, length "
                "or model)"
            )


def measuring_packages() -> dict[str, str]:
    """Returns the versions of the packages whose arithmetic a measurement shows."""
    used = llama_library.installed()
    names = (*MEASURING_PACKAGES, used.package if used else "")
    return {name: number for name, number in machine.packages().items() if name in names}


@dataclass(frozen=True)
class Looked:
    """What is known of a set of tasks before they are measured."""

    digest: str
    letters: int
    documents: int


def look(accuracy: Accuracy) -> Looked:
    """Returns what is known of a set of tasks.

    Raises:
        RequestError: there is no such task, or its data cannot be had.
    """
    if accuracy.harness:
        facts = harness.look(accuracy)
        return Looked(facts.digest, facts.letters, facts.documents)
    tasks = choices.load_choices(accuracy.local or accuracy.task, accuracy.most)
    letters = sum(len(task.context) + sum(map(len, task.endings)) for task in tasks)
    return Looked(choices.digest(tasks), letters, len(tasks))


def _identity(perplexity: Perplexity) -> str:
    """Returns the digest of what perplexity is measured on; a protocol may take documents one by one."""
    found = text.read(perplexity.data, "perplexity")
    plain = [each for each in found if isinstance(each, str)]
    if perplexity.protocol != "lm-eval" or len(plain) < len(found):
        return text.identity(perplexity.data, "perplexity")
    return text.digest("\0".join([each for each in plain if each.strip()][: perplexity.samples]))


def _lengths(perplexity: Perplexity) -> list[int]:
    """Returns the letters of each document that perplexity is measured on, of one text by most protocols."""
    found = [text.letters_of(each) for each in text.read(perplexity.data, "perplexity")]
    return found[: perplexity.samples] if perplexity.protocol == "lm-eval" else [sum(found)]


def predict_measurement(settings: Settings, facts: ModelFacts) -> Estimate:
    """Returns what a measurement should cost: products of every token with every weight."""
    fixed = 550_000_000
    if isinstance(settings, Loaders):  # two loaders, each reading every weight and maybe unpacking it
        return Estimate(
            seconds=6 + 4e-8 * facts.params, peak_bytes=fixed + 100_000_000 + 3 * facts.params, disk_bytes=10_000
        )
    flops = 2.0 * (facts.layers * facts.layer_linear_params + facts.vocab * facts.hidden)
    if isinstance(settings, Perplexity):
        documents = [each / BYTES_PER_TOKEN for each in _lengths(settings)]
        tokens, length = sum(documents), settings.tokens(facts.context)
        if settings.protocol == "lm-eval":
            length = int(min(length, max(documents) + 1))
        elif settings.most:
            tokens = min(tokens, settings.most * length)
        # the last products are the reference's head, for the divergence
        work = tokens * (flops + 2.0 * facts.vocab * facts.hidden)
        peak = fixed + 4 * facts.params + 12 * length * facts.vocab + 4 * facts.vocab * facts.hidden
        return Estimate(
            float32_flops=work, seconds=6, peak_bytes=int(peak), disk_bytes=int(tokens * (16 + 4 * facts.hidden))
        )
    if isinstance(settings, Accuracy):
        looked = look(settings)
        peak = fixed + 4 * facts.params + 300_000_000
        return Estimate(
            float32_flops=looked.letters / BYTES_PER_TOKEN * flops,
            seconds=6,
            peak_bytes=peak,
            disk_bytes=100 * looked.documents,
        )
    if isinstance(settings, Load):
        read = len(settings.rate) * settings.requests * settings.generate * 2.0 * facts.params / 10e9
        waits = sum(settings.requests / rate for rate in settings.rate)
        return Estimate(seconds=10 + max(read, waits), peak_bytes=fixed + 3 * facts.params, disk_bytes=10_000)
    if isinstance(settings, Speculative):
        read = 3 * settings.samples * settings.generate * 2.0 * facts.params / 10e9
        return Estimate(seconds=8 + read, peak_bytes=fixed + 5 * facts.params, disk_bytes=10_000)
    shapes = len(settings.batch) * len(settings.prompt)
    bytes_read = shapes * (settings.repeats + 2) * settings.generate * 2.0 * facts.params
    return Estimate(
        fast_flops=sum(settings.batch) * sum(settings.prompt) * (settings.repeats + 2) * flops,
        seconds=6 + bytes_read / 10e9,
        peak_bytes=fixed + 3 * facts.params,
        disk_bytes=10_000,
    )


def this_machine() -> dict[str, Any]:
    """Returns what a speed depends on: processor, cores, memory, GPUs."""
    found = machine.fingerprint()
    return {name: found.get(name) for name in ("cpu", "cores", "memory_bytes", "gpus")}


def nominal_flops(device: Device = CPU) -> tuple[float, float]:
    """Returns floating-point operations per second of a device: bfloat16 (or the best it has), and float32.

    Rough figures, per core for the processor; a `Predictor` corrects them by what earlier stages took.
    """
    if device.name != "cpu":
        return GPU_FLOPS
    found = machine.fingerprint()
    cores = int(found["cores"])
    wide = "avx512f" in found["flags"]
    plain = cores * (70e9 if wide else 35e9)
    fast = cores * 150e9 if {"avx512_bf16", "amx_bf16"} & set(found["flags"]) else plain
    return fast, plain


class Predictor:
    """Turns estimates into predictions for this machine, corrected by what earlier stages took here."""

    def __init__(self, store: Store, device: Device = CPU) -> None:
        here = this_machine() | device.key()
        fast, plain = nominal_flops(device)
        self._rates = fast, plain
        ratios: dict[str, list[float]] = {}
        for cost in store.costs():
            if cost.get("machine") == here and cost.get("nominal_seconds"):
                ratios.setdefault(cost["what"], []).append(cost["seconds"] / cost["nominal_seconds"])
        self._ratios = {what: median(values) for what, values in ratios.items()}

    def nominal_seconds(self, stage: Stage) -> float:
        """Returns the time by arithmetic alone."""
        work = stage.estimate.fast_flops / self._rates[0] + stage.estimate.float32_flops / self._rates[1]
        return float(4 + stage.estimate.seconds + work)

    def predict(self, stage: Stage) -> Prediction:
        """Returns time, peak memory and disk of a stage."""
        seconds = self.nominal_seconds(stage) * self._ratios.get(what(stage), 1.0)
        return Prediction(seconds, stage.estimate.peak_bytes, stage.estimate.disk_bytes)


def what(stage: Stage) -> str:
    """Returns the class of stages whose costs tell about each other."""
    origin = stage.parents[0].kind if stage.measure else ""
    return f"{stage.measure or stage.name} {origin}".strip()
