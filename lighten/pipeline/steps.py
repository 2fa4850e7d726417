"""Which step kinds a recipe may name, and where each lives."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lighten.errors import RequestError
from lighten.model.export_formats import EXPORTS
from lighten.process.isolate import share_cores
from lighten.settings import as_spelled
from lighten.step import Context, Report, Step
from lighten.store.artifact import Artifact, read_artifact

STEPS: dict[str, str | dict[str, str]] = {
    "prune": "lighten.compress.prune.settings:Prune",
    "distill": "lighten.compress.distill.settings:Distill",
    "quantize": "lighten.compress.quantize.settings:Quantize",
    "export": EXPORTS.places,
}
"""Step kind to "module:Class", by `format` where a kind has several; packages add more through the entry-point group
`lighten.steps`."""

INTERNAL = {
    "source": "lighten.model.source:Source",
    "sweep": "lighten.compress.calibrate.sweep:Sweep",
    "sensitivity": "lighten.compress.calibrate.sensitivity:Sensitivities",
    "teacher": "lighten.compress.distill.teacher:Teacher",
}
"""Stages that the pipeline adds by itself."""


def kinds() -> dict[str, str | dict[str, str]]:
    """Returns every step kind that a recipe may name."""
    added = {entry.name: entry.value for entry in entry_points(group="lighten.steps")}
    return {**added, **STEPS}


def step_classes(kind: str) -> dict[str, type[Step]]:
    """Returns the settings classes of a step kind by format; "" for a kind that has one class.

    Raises:
        RequestError: there is no such kind.
    """
    known = {**kinds(), **INTERNAL}
    if kind not in known:
        raise RequestError(f"there is no step {kind!r}; there is {', '.join(kinds())}")
    found = known[kind]
    return {name: _load(place) for name, place in (found if isinstance(found, dict) else {"": found}).items()}


def step_class(kind: str, settings: Mapping[str, Any] | None = None) -> type[Step]:
    """Returns the settings class of a step kind, for these settings.

    Raises:
        RequestError: there is no such kind, or it has no such format.
    """
    found = ({**kinds(), **INTERNAL}).get(kind)
    if not isinstance(found, dict):
        return step_classes(kind)[""]
    given = as_spelled((settings or {}).get("format"), list(found))
    if given not in found:
        said = f"not {given!r}" if given is not None else "and none was given"
        raise RequestError(f"{kind}: format must be one of {', '.join(found)}, {said}")
    return _load(found[given])


def _load(place: str) -> type[Step]:
    module, _, name = place.partition(":")
    found: type[Step] = getattr(importlib.import_module(module), name)
    return found


def run_step(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Runs one step in this process; the target of `lighten.process.isolate.run_isolated`.

    Args:
        payload: kind, settings, inputs (paths by role: source, grams, …), out, scratch, key, device,
            trust_remote_code.
        report: where progress goes.

    Returns:
        The facts of what was written, and the warnings.
    """
    share_cores()
    step = step_class(payload["kind"], payload["settings"])(**payload["settings"])
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
