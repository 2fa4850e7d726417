"""Who is told what a run does."""

from __future__ import annotations

from typing import Protocol

from lighten.pipeline.stage import Plan, Stage
from lighten.step import Report


class Watcher(Protocol):
    """Is told what a run does; the CLI draws it."""

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """All stages and their predicted seconds, by key."""

    def started(self, stage: Stage) -> Report:
        """A stage begins; returns where its progress goes."""

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """A stage ended: cached if `seconds` is None, failed if `error` is given."""

    def say(self, message: str) -> None:
        """Something the person should know."""


class Silent:
    """A watcher that tells nobody."""

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """Ignores it."""

    def started(self, stage: Stage) -> Report:
        """Returns a report that goes nowhere."""
        return lambda done, total, note: None

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """Ignores it."""

    def say(self, message: str) -> None:
        """Ignores it."""
