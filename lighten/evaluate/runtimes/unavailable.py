"""The error for what a runtime cannot do, which is a result and no failure."""

from __future__ import annotations

from typing import Any


class Unavailable(Exception):
    """The error that the runtime of a model cannot do a measurement. Its text says why."""

    def __init__(self, why: str, facts: dict[str, Any]) -> None:
        """Takes the reason, and the facts about what ran the model."""
        super().__init__(why)
        self.facts = facts
