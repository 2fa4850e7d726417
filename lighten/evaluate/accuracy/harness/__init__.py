"""Tasks of EleutherAI's lm-eval on every runtime. Imports nothing heavy: what needs lm-eval runs in another process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lighten.errors import RequestError, missing_extra
from lighten.evaluate.accuracy.harness import files
from lighten.evaluate.accuracy.tasks import Tasks
from lighten.process.isolate import run_isolated


@dataclass(frozen=True)
class Facts:
    """A task as lm-eval builds it."""

    task: str
    """Its name."""
    documents: int
    letters: int
    """Characters of all requests, the contexts that several share counted once."""
    digest: str
    """SHA-256 of every request, the documents behind them, and how they are scored."""
    version: str
    """Of lm-eval."""


def look(settings: Tasks) -> Facts:
    """Returns the facts of a task, whose data set is fetched for it.

    A task file that did not come with lm-eval is only read: nothing in it runs, and its documents are not counted but
    guessed.

    Raises:
        RequestError: lm-eval is not installed or has no such task, or its data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise missing_extra(
            "harness", "lm_eval", f"the task {settings.task!r} (not builtin, hellaswag or a .jsonl file)"
        )
    if (file := settings.task_file) is None:
        return build(settings)
    if not file.is_file():
        raise RequestError(f"there is no task file {file}: check the path")
    return Facts(**files.facts(file, Path(settings.local).expanduser() if settings.local else None, settings.limit))


@cache
def build(settings: Tasks) -> Facts:
    """Returns the facts of a task as lm-eval builds it, which runs what a task file says.

    Raises:
        RequestError: lm-eval has no such task, or its data cannot be had.
    """
    asked = settings.model_dump(mode="json")
    return Facts(**run_isolated("lighten.evaluate.accuracy.harness.tasks:describe", asked).value)
