"""The steps that a recipe may name, and the place of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.compress.quantize.methods import METHODS
from lighten.errors import Failure, RequestError
from lighten.model.export_formats import EXPORTS
from lighten.plugins import Table, found_at
from lighten.process.isolate import share_cores
from lighten.settings import as_spelled, rebuilt
from lighten.step import Context, Report, Step
from lighten.store.artifact import Artifact, read_artifact


@dataclass(frozen=True)
class Choice:
    """The settings classes of a step that has several. The value of one setting chooses the class."""

    by: str
    """Name of that setting."""
    table: Table
    """Class for each of its values."""
    default: str | None = None
    """Default of the setting."""

    def of(self, settings: Mapping[str, Any]) -> type[Step]:
        """Returns the class for such settings.

        Raises:
            RequestError: the value is missing or not known.
        """
        given = settings.get(self.by)
        given = self.default if given is None else as_spelled(given, self.table.names)
        if given not in self.table.names:
            said = f"not {given!r}" if given is not None else "and none was given"
            *most, last = map(repr, self.table.names)
            raise RequestError(f"{self.by}: must be {', '.join(most)} or {last}, {said}")
        found: type[Step] = self.table.load(given)
        return found


CHOICES = {"quantize": Choice("method", METHODS, default="gptq"), "export": Choice("format", EXPORTS)}
"""The steps with several settings classes."""
INTERNAL = {
    "source": "lighten.model.source:Source",
    "file": "lighten.model.source:GgufFile",
    "sweep": "lighten.compress.calibrate.sweep:Sweep",
    "reads": "lighten.compress.calibrate.reads:Reads",
    "sensitivity": "lighten.compress.calibrate.sensitivity:Sensitivities",
    "teacher": "lighten.compress.distill.teacher:Teacher",
    "pairs": "lighten.compress.distill.pair_teacher:PairTeacher",
}
"""Stages that the pipeline adds by itself."""
STEPS = Table(
    "step",
    "lighten.steps",
    {
        "prune": "lighten.compress.prune.settings:Prune",
        "distill": "lighten.compress.distill.settings:Distill",
        "polish": "lighten.compress.polish.settings:Polish",
        "runtime": "lighten.evaluate.runtimes.endpoint.step:Endpoint",
    },
    base="lighten.step:Step",
    key="kind",
    taken=(*CHOICES, *INTERNAL),
)
"""The steps with one settings class."""


def kinds() -> list[str]:
    """Returns the names of all steps that a recipe may have."""
    return [*STEPS.rows, *CHOICES, *STEPS.added]


def step_classes(kind: str) -> list[type[Step]]:
    """Returns all settings classes of a step, without those of installed packages that cannot be used.

    Raises:
        RequestError: the step does not exist.
        Failure: the package that brings the step cannot be used.
    """
    return list(CHOICES[kind].table.usable().values()) if kind in CHOICES else [step_class(kind)]


def step_class(kind: str, settings: Mapping[str, Any] | None = None) -> type[Step]:
    """Returns the settings class of a step, for these settings.

    Raises:
        RequestError: the step does not exist, or has no such format or method.
        Failure: the package that brings the step, the format or the method cannot be used.
    """
    if kind in CHOICES:
        return CHOICES[kind].of(settings or {})
    if kind not in INTERNAL and kind not in kinds():
        raise RequestError(f"there is no step {kind!r}; there is {', '.join(kinds())}")
    one: type[Step] = found_at(INTERNAL[kind]) if kind in INTERNAL else STEPS.load(kind)
    return one


def open_step(kind: str, settings: Mapping[str, Any]) -> Step:
    """Returns the settings of a step, checked.

    Raises:
        RequestError: the step does not exist, or has no such format or method.
        ValidationError: a setting is wrong.
        Failure: the package that brings the step cannot be used, or has settings that `checked` refuses.
    """
    step = step_class(kind, settings).model_validate(dict(settings))
    checked(step)
    return step


def checked(step: Step) -> dict[str, Any]:
    """Returns checked settings as JSON, which `run_step` takes without another check.

    Raises:
        Failure: the settings would be others there. That is a mistake in the class of the step.
    """
    settings = step.model_dump(mode="json")
    try:
        arrived = rebuilt(type(step), settings)
    except TypeError as error:
        raise Failure(f"the settings of the step {step.kind} cannot be written as JSON: {error}") from error
    if arrived != step:
        raise Failure(
            f"the settings of the step {step.kind} cannot be written as JSON: {arrived!r} instead of {step!r}"
        )
    return {"kind": step.kind, "settings": settings}


def run_step(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Runs one step in this process; the target of `lighten.process.isolate.run_isolated`.

    Args:
        payload: step (what `checked` returned), inputs (paths by role: source, grams, …), out, scratch, key, device,
            trust_remote_code.
        report: where progress goes.

    Returns:
        The facts of what was written, and the warnings.
    """
    share_cores()
    settings = payload["step"]["settings"]
    step = rebuilt(step_class(payload["step"]["kind"], settings), settings)
    out = Path(payload["out"])
    inputs = {role: Path(path) for role, path in payload["inputs"].items()}
    source = read_artifact(inputs.pop("source")) if "source" in inputs else Artifact(out, {})
    context = Context(
        report,
        **inputs,  # type: ignore[arg-type]
        scratch=Path(payload["scratch"]) if payload["scratch"] else None,
        key=payload.get("key"),
        device=payload["device"],
        trust_remote_code=payload["trust_remote_code"],
    )
    facts = step.run(source, out, context)
    return {**facts, "warnings": context.warnings}
