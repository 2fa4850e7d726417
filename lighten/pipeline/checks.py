"""Checks that refuse a request before any work."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lighten.errors import RequestError, missing_extra
from lighten.evaluate import machine
from lighten.evaluate.measurement import MEASUREMENTS, Measurement
from lighten.evaluate.runtimes.choose import opener
from lighten.evaluate.settings import Evaluate
from lighten.facts import TITLES, ModelFacts
from lighten.model.accelerator import Device
from lighten.model.formats import FORMATS
from lighten.pipeline.stage import Plan, Stage, sources


def check_measurable(facts: ModelFacts, evaluate: Evaluate, name: str) -> None:
    """Raises RequestError if a measurement needs something that the model lacks, or more positions than it takes."""
    unfit = [each for each in evaluate.asked if facts.task not in each.tasks]
    if unfit:
        wanted = dict.fromkeys(each.name for each in unfit)
        of_causal = all(each.tasks == ("causal",) for each in unfit)
        what = "no causal language model" if of_causal else TITLES[facts.task]
        able = [name for name, each in MEASUREMENTS.usable().items() if facts.task in each.tasks]
        raise RequestError(
            f"{facts.architecture} is {what}: {', '.join(wanted)} cannot be measured on it, only its size and "
            f"{', '.join(able)} (evaluate: {{}}, or --skip each of the others)"
        )
    for each in evaluate.asked:
        each.check(facts, name)


def check_texts(model: Path, evaluate: Evaluate) -> None:
    """Raises RequestError or Failure if a model cannot be measured on a text or task; before any work."""
    for each in evaluate.asked:
        each.check_text(model)


def check_kernels(settings: Measurement, stage: Stage, origin: Path | None) -> None:
    """Raises RequestError if the speed of kernels is asked for that are not installed.

    Args:
        settings: the measurement.
        stage: what makes the model.
        origin: the directory of the model that it was made from; None if there is none.
    """
    made, facts = stage.shaped.step, stage.facts
    stored_as = FORMATS.get(made.writes) if made and made.runtime == "torch" else None
    absent = [module for module in stored_as.loaded_with if find_spec(module) is None] if stored_as else []
    if not absent or stored_as is None or facts is None or facts.task != "causal" or origin is None:
        return
    from lighten.model import whole

    if not whole.may_be_needed(origin, trust_remote_code=any(each.trust_remote_code for each in sources(stage))):
        raise missing_extra(stored_as.extra, absent[0], f"evaluate.{settings.name} of quantized weights")


def arithmetic(params: int, device: Device) -> str | None:
    """Returns the arithmetic of quality on a GPU, the same for all variants: float32 if the source fits.

    None on the processor, where it is always float32.
    """
    if device.name == "cpu":
        return None
    return "float32" if device.holds(1.5 * 4 * params) else "bfloat16"


def device_bytes(stage: Stage) -> int:
    """Returns about how much of a GPU's memory a stage takes; 0 for a stage that computes elsewhere."""
    facts = stage.parents[0].facts if stage.parents else None
    if stage.step and not stage.step.computes:
        return 0
    if stage.settings is None or facts is None:
        return stage.estimate.peak_bytes
    step = stage.parents[0].shaped.step
    elsewhere = stage.at is not None or (step is not None and not opener(step.runtime).takes_options)
    return 0 if elsewhere else stage.settings.device_bytes(facts, 4 if stage.arithmetic == "float32" else 2)


def check_memory(todo: Plan) -> None:
    """Raises RequestError if a stage needs more memory than the GPU has, or a step of a whole model than there is."""
    for stage in todo.stages:
        if stage.step and stage.step.whole and todo.device.name == "cpu":
            there, needed = machine.fingerprint()["memory_bytes"], stage.estimate.peak_bytes
            if needed > there:
                raise RequestError(
                    f"{stage.name} needs about {needed / 1e9:.0f} GB, for it holds the whole model, and this machine "
                    f"has {there / 1e9:.0f} GB: leave it out, or run it on a larger machine"
                )
        needed = device_bytes(stage)
        if not todo.device.holds(needed):
            assert todo.device.total_bytes
            raise RequestError(
                f"{stage.name} needs about {needed / 1e9:.0f} GB, and {todo.device.name} ({todo.device.title}) has "
                f"{todo.device.total_bytes / 1e9:.0f} GB: take --device cpu, or ask for less (a smaller batch, length "
                "or model)"
            )
