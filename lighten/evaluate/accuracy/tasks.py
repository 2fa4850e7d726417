"""The tasks with right answers: which, how many questions, and who scores them."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lighten.evaluate.paired import Z95
from lighten.settings import AnyCase

Scorer = Literal["lighten", "lm-eval"]
OWN_TASKS = ("builtin", "hellaswag")


class Tasks(AnyCase, BaseModel):
    """Tasks with right answers: a named task, or a `local` file under that name; at most `limit` of its documents.

    Multiple choice in HellaSwag's format is scored here; lm-eval scores every other task. `shots` are examples before
    each question, which lm-eval puts there. `within`, instead of `limit`, asks for as many documents as make an
    accuracy of one half, the hardest case, known within that much. The number follows from the setting alone. With
    `chat`, lm-eval asks in the model's own chat template, the examples as turns, after a `system` text if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = "builtin"
    local: str | None = None
    limit: int | None = Field(None, ge=1)
    within: float | None = Field(None, gt=0, lt=0.5)
    scorer: Scorer | None = None
    shots: int | None = Field(None, ge=0)
    chat: bool = False
    system: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _own_scorer_knows_it(self) -> Self:
        if self.scorer == "lighten" and not (self.local or self.task in OWN_TASKS):
            raise ValueError(f"lighten's own scorer knows {', '.join(OWN_TASKS)} and `local` files, not {self.task!r}")
        if self.scorer == "lm-eval" and self.task == "builtin":
            raise ValueError("the built-in tasks are none of lm-eval's: name one of its tasks, or a task's .yaml file")
        if self.shots and not self.harness:
            raise ValueError("shots are put before the question by lm-eval: add `scorer: lm-eval`")
        if self.chat and not self.harness:
            raise ValueError("chats are put in the model's template by lm-eval: add `scorer: lm-eval`")
        if self.system is not None and not self.chat:
            raise ValueError("system is the first text of a chat: add `chat: true`")
        if self.within is not None and (self.limit is not None or self.harness):
            why = "lm-eval counts them: set limit" if self.harness else "limit says how many already"
            raise ValueError(f"within decides how many documents are scored, but {why}, and leave within out")
        return self

    @property
    def most(self) -> int | None:
        """Maximum number of documents; None for all. Then half of Wilson's interval, 1.96 / (2 √(n + 1.96²)), fits."""
        return self.limit if self.within is None else math.ceil((Z95 / (2 * self.within)) ** 2 - Z95**2)

    @property
    def task_file(self) -> Path | None:
        """File of the task, if it did not come with lm-eval, which runs what such a file says."""
        file = Path(self.task).expanduser()
        if not self.harness or file.suffix not in (".yaml", ".yml"):
            return None
        spec = find_spec("lm_eval")
        own = [Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or ()]
        return None if any(file.resolve().is_relative_to(folder) for folder in own) else file

    @property
    def harness(self) -> bool:
        """Whether lm-eval builds the requests and reads the answers."""
        return not (self.local or self.task in OWN_TASKS) if self.scorer is None else self.scorer == "lm-eval"
