"""Filled gaps: settings, prediction and columns of a row."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from lighten.evaluate.measurement import BYTES_PER_TOKEN, FIXED_BYTES, linear_flops
from lighten.evaluate.sentences.settings import OfSentences
from lighten.facts import ModelFacts, Task
from lighten.step import Estimate


class Masked(OfSentences):
    """Share of hidden tokens that an encoder finds: the share `hidden` of the tokens of `samples` sentences.

    Which tokens are hidden depends on `seed` and the tokenizer alone (Devlin et al., "BERT", 2018, hide 15 %).
    """

    name = "masked"
    work = "lighten.evaluate.masked.work:measure"
    needs = frozenset({"fills"})
    tasks: ClassVar[tuple[Task, ...]] = ("masked",)
    of_quality = True

    hidden: float = Field(0.15, gt=0, lt=1)
    batch: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of a pass over every sentence."""
        found = self.sentences()
        return Estimate(
            float32_flops=sum(map(len, found)) / BYTES_PER_TOKEN * linear_flops(facts),
            seconds=6,
            peak_bytes=FIXED_BYTES + 4 * facts.params + 4 * self.batch * 64 * facts.vocab,
            disk_bytes=10_000,
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the share into a row."""
        row["masked"] = result["masked"]
