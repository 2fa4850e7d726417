"""The question: where the model must run, what it may cost, and what matters most."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from lighten.errors import RequestError
from lighten.evaluate.runtimes import RUNTIMES
from lighten.export.bundle.targets import Target, find_target
from lighten.settings import as_spelled, parse_size

Prefer = Literal["speed", "quality", "size", "memory"]
Purpose = Literal["inference", "training", "edge"]


@dataclass(frozen=True)
class Question:
    """One situation. Fractions are fractions of 1, sizes are bytes; None is no limit."""

    purpose: Purpose = "inference"
    prefer: Prefer = "speed"
    memory: int | None = None
    target: Target | None = None
    max_drop: float | None = None
    max_ppl: float | None = None
    context: int | None = None
    runtime: str | None = None

    @property
    def room(self) -> int | None:
        """Memory that the model may take: the smaller of the given memory and what the device has left."""
        found = [size for size in (self.memory, self.target.free_bytes if self.target else None) if size is not None]
        return min(found, default=None)


def ask(
    *,
    purpose: str | None = None,
    prefer: str = "speed",
    memory: str | None = None,
    target: str | None = None,
    max_drop: str | None = None,
    max_ppl: str | None = None,
    context: int | None = None,
    runtime: str | None = None,
) -> Question:
    """Returns the question that the texts of the command line ask. A small device makes it a question of the edge.

    Raises:
        RequestError: a text cannot be read; the message says how it is written.
    """
    device = find_target(target) if target else None
    purpose, prefer = as_spelled(purpose, list(get_args(Purpose))), as_spelled(prefer, list(get_args(Prefer)))
    runtime = as_spelled(runtime, RUNTIMES.names)
    if purpose is None:
        purpose = "edge" if device and device.architecture == "aarch64" else "inference"
    if purpose not in get_args(Purpose):
        raise RequestError(f"--for {purpose}: there is {', '.join(get_args(Purpose))}")
    if prefer not in get_args(Prefer):
        raise RequestError(f"--prefer {prefer}: there is {', '.join(get_args(Prefer))}")
    if context is not None and context < 1:
        raise RequestError(f"--context {context}: give a number of tokens of at least 1")
    try:
        size = parse_size(memory) if memory else None
    except ValueError as error:
        raise RequestError(f"--memory {error}") from error
    if purpose == "training" and (max_drop or max_ppl or runtime):
        raise RequestError("--max-drop, --max-ppl and --runtime are about an artifact that is run, not about training")
    return Question(
        purpose,  # type: ignore[arg-type]
        prefer,  # type: ignore[arg-type]
        size,
        device,
        _fraction("--max-drop", max_drop, "pp", "1pp"),
        _fraction("--max-ppl", max_ppl, "%", "+5%"),
        context,
        runtime,
    )


def _fraction(flag: str, text: str | None, unit: str, example: str) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(rf"\s*\+?(\d+(?:\.\d+)?)\s*{unit}\s*", text)
    if not found:
        raise RequestError(f"{flag} {text!r} cannot be read: write it as {flag} {example}")
    return float(found[1]) / 100
