"""Tasks of EleutherAI's lm-eval on every runtime. Nothing heavy is imported: lm-eval runs in another process."""

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
    """Name of the task."""
    documents: int
    letters: int
    """Characters of all requests. A context that several requests share counts once."""
    digest: str
    """SHA-256 of every request, the documents behind them, and how they are scored."""
    version: str
    """Version of lm-eval."""
    writes: bool = False
    """Whether the model writes answers."""


def facts_of(settings: Tasks) -> Facts:
    """Returns the facts of a task, and fetches its data set.

    A task file that did not come with lm-eval is only read: nothing in it runs, and the number of its documents is a
    guess.

    Raises:
        RequestError: lm-eval is not installed or has no such task, or its data cannot be fetched.
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
    """Returns the facts of a task as lm-eval builds it, which runs the code of a task file.

    Raises:
        RequestError: lm-eval has no such task, or its data cannot be fetched.
    """
    asked = settings.model_dump(mode="json")
    return Facts(**run_isolated("lighten.evaluate.accuracy.harness.tasks:describe", asked).value)
