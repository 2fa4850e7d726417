"""The listener of a run, which learns about its stages."""

from __future__ import annotations

from typing import Protocol

from lighten.pipeline.stage import Plan, Stage
from lighten.step import Report


class Watcher(Protocol):
    """Learns about the stages of a run; the CLI draws them."""

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """Gets all stages, and their predicted seconds by key."""

    def started(self, stage: Stage) -> Report:
        """Learns that a stage begins; returns the function that takes its progress."""

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """Learns that a stage ended: cached if `seconds` is None, failed if `error` is given."""

    def say(self, message: str) -> None:
        """Gets a message for the person."""


class Silent:
    """A watcher that shows nothing."""

    def planned(self, plan: Plan, predicted: dict[str, float]) -> None:
        """Does nothing."""

    def started(self, stage: Stage) -> Report:
        """Returns a report that does nothing."""
        return lambda done, total, note: None

    def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
        """Does nothing."""

    def say(self, message: str) -> None:
        """Does nothing."""
