"""The stages of a plan, and the parts of their keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lighten.evaluate.measurement import Measurement
from lighten.evaluate.serving.settings import Serve
from lighten.facts import ModelFacts
from lighten.model.accelerator import CPU, Device
from lighten.model.source import Found, Source
from lighten.pipeline.recipe import Recipe
from lighten.step import Estimate, Step


@dataclass(frozen=True)
class At:
    """Where a model is measured over HTTP: in a server that lighten starts, or on one that runs."""

    key: dict[str, Any]
    """Part of the key of a measurement there."""
    serve: Serve | None = None
    """The server to start."""
    positions: int = 0
    """Length of the texts that it must take."""
    address: str = ""
    """Address of the server that runs."""


@dataclass
class Stage:
    """A step or a measurement with its inputs resolved."""

    name: str
    kind: str
    version: int
    key: str
    config: dict[str, Any]
    """Part of the key, together with kind, version and the parents' keys."""
    parents: list[Stage]
    estimate: Estimate
    step: Step | None = None
    settings: Measurement | None = None
    """What is measured, if it is a measurement."""
    variants: list[str] = field(default_factory=list)
    roles: tuple[str, ...] = ()
    """Role of each parent for the step or measurement: source, grams, tokenizer, …"""
    facts: ModelFacts | None = None
    """Sizes of the resulting model, as far as they are known in advance."""
    arithmetic: str | None = None
    """Arithmetic that quality is measured in, if the device has a choice."""
    remarks: list[str] = field(default_factory=list)
    """What the person should know before it is built."""
    at: At | None = None
    """Where it is measured, if that is over HTTP."""

    @property
    def measure(self) -> str | None:
        """Name of the measurement; None for a step."""
        return self.settings.name if self.settings else None

    @property
    def shaped(self) -> Stage:
        """The stage that gave its output the form that it has: itself, unless its step keeps that of its source."""
        return self.parents[0].shaped if self.step and self.step.keeps_form else self

    def user(self, variant: str) -> None:
        """Notes that a variant needs this stage and all its parents."""
        for stage in (self, *self.parents):
            if variant not in stage.variants:
                stage.variants.append(variant)
            if stage is not self:
                stage.user(variant)


@dataclass
class Plan:
    """Every stage of a recipe, each after the stages that it needs."""

    recipe: Recipe
    source: Found
    stages: list[Stage]
    artifacts: dict[str, Stage]
    """Last stage of every variant."""
    measurements: dict[str, list[Stage]]
    """Measurements of every variant."""
    device: Device = CPU
    """Device that the plan is for."""

    @property
    def in_order(self) -> list[Stage]:
        """The stages, measurements last."""
        return sorted(self.stages, key=lambda stage: stage.measure is not None)


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
    """Returns whether a stage may run code that comes with a model. All models that it opens must be trusted."""
    found = sources(stage)
    return bool(found) and all(each.trust_remote_code for each in found)
