"""Which step kinds a recipe may name, and where each lives."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lighten.errors import RequestError
from lighten.process import share_cores
from lighten.stage import Context, Report, Step
from lighten.store import Artifact, read_artifact

STEPS = {
    "prune": "lighten.compress.prune:Prune",
    "distill": "lighten.compress.distill:Distill",
    "quantize": "lighten.compress.quantize:Quantize",
    "export": "lighten.export.step:Export",
}
"""Step kind to "module:Class"; packages add more through the entry-point group `lighten.steps`."""

INTERNAL = {
    "source": "lighten.model.source:Source",
    "sweep": "lighten.compress.sweep:Sweep",
    "sensitivity": "lighten.compress.sensitivity:Sensitivities",
    "teacher": "lighten.compress.teacher:Teacher",
}
"""Stages that the pipeline adds by itself."""


def kinds() -> dict[str, str]:
    """Returns every step kind that a recipe may name."""
    added = {entry.name: entry.value for entry in entry_points(group="lighten.steps")}
    return {**added, **STEPS}


def step_class(kind: str) -> type[Step]:
    """Returns the settings class of a step kind.

    Raises:
        RequestError: there is no such kind.
    """
    known = {**kinds(), **INTERNAL}
    if kind not in known:
        raise RequestError(f"there is no step {kind!r}; there is {', '.join(kinds())}")
    module, _, name = known[kind].partition(":")
    found: type[Step] = getattr(importlib.import_module(module), name)
    return found


def run_step(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Runs one step in this process; the target of `lighten.process.run_isolated`.

    Args:
        payload: kind, settings, inputs (paths by role: source, grams, …), out, scratch, device, trust_remote_code.
        report: where progress goes.

    Returns:
        The facts of what was written, and the warnings.
    """
    share_cores()
    step = step_class(payload["kind"])(**payload["settings"])
    out = Path(payload["out"])
    inputs = {role: Path(path) for role, path in payload["inputs"].items()}
    source = read_artifact(inputs.pop("source")) if "source" in inputs else Artifact(out, {})
    context = Context(
        report,
        **inputs,  # type: ignore[arg-type]
        scratch=Path(payload["scratch"]) if payload["scratch"] else None,
        device=payload["device"],
        trust_remote_code=payload["trust_remote_code"],
    )
    facts = step.run(source, out, context)
    return {**facts, "warnings": context.warnings}
