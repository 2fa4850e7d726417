"""Accuracy in tasks: key, checks, prediction and columns of a row. The settings are those of the tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from lighten.data import choices
from lighten.errors import RequestError
from lighten.evaluate.accuracy import harness
from lighten.evaluate.accuracy.change import change
from lighten.evaluate.accuracy.tasks import Tasks
from lighten.evaluate.measurement import BYTES_PER_TOKEN, FIXED_BYTES, Measurement, linear_flops
from lighten.facts import ModelFacts
from lighten.model.template import has_chat_template
from lighten.step import Estimate

WRITING_BYTES = 1_600_000_000
"""Bytes of keys and values of the answers that are written at the same time, at most."""


@dataclass(frozen=True)
class Known:
    """The facts about a set of tasks before they are measured."""

    digest: str
    letters: int
    documents: int
    writes: bool = False
    """Whether answers are written."""


class Accuracy(Tasks, Measurement):
    """Share of right answers to a set of tasks."""

    name = "accuracy"
    work = "lighten.evaluate.accuracy.work:measure"
    younger: ClassVar[dict[str, Any]] = {"scorer": None, "shots": None, "within": None, "chat": False, "system": None}
    needs = frozenset({"scores"})
    over_http = True
    of_quality = True

    @property
    def title(self) -> str:
        """Accuracy, with the task if lm-eval has it."""
        return f"accuracy in {Path(self.task).stem}" if self.harness else "accuracy"

    def known(self) -> Known:
        """Returns the facts about the tasks.

        Raises:
            RequestError: the task does not exist, or its data cannot be fetched.
        """
        if self.harness:
            facts = harness.facts_of(self)
            return Known(facts.digest, facts.letters, facts.documents, facts.writes)
        tasks = choices.load_choices(self.local or self.task, self.most)
        letters = sum(len(task.context) + sum(map(len, task.endings)) for task in tasks)
        return Known(choices.digest(tasks), letters, len(tasks))

    def data_digest(self) -> str:
        """Returns the SHA-256 of every question with its answers, and of the way of asking if that is a chat."""
        found = self.known().digest
        return sha256(json.dumps([found, "chat", self.system]).encode()).hexdigest() if self.chat else found

    def key_facts(self) -> dict[str, Any]:
        """Returns the version of lm-eval, if lm-eval scores."""
        return {"lm_eval": harness.facts_of(self).version} if self.harness else {}

    def check_text(self, model: Path) -> None:
        """See `Measurement`: a chat needs a template."""
        if self.chat and not has_chat_template(model):
            raise RequestError(
                f"{model} has no chat template, so {self.task} cannot be asked in chats: leave out `chat`, or put its "
                "chat_template.jinja beside the tokenizer"
            )

    def prepare(self) -> None:
        """Builds the requests of a task file, which the key only read."""
        if self.task_file:
            harness.build(self)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of a pass over every question with every answer."""
        known = self.known()
        return Estimate(
            float32_flops=known.letters / BYTES_PER_TOKEN * linear_flops(facts),
            seconds=6,
            peak_bytes=FIXED_BYTES + 4 * facts.params + (WRITING_BYTES if known.writes else 300_000_000),
            disk_bytes=100 * known.documents,
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the accuracy in these tasks into a row, beside that in other tasks."""
        row.setdefault("accuracy", []).append(result["accuracy"])

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Puts the paired change of accuracy into a row."""
        row.setdefault("delta", {}).setdefault("accuracy", []).append(change(measured, baseline))
