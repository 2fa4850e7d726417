"""Quality of translations: settings, checks, prediction and columns of a row."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from lighten.data import pairs
from lighten.data.phrases import Pair
from lighten.errors import missing_extra
from lighten.evaluate.measurement import BYTES_PER_TOKEN, FIXED_BYTES, READ_PER_SECOND, Measurement
from lighten.facts import ModelFacts, Task
from lighten.step import Estimate


class Translation(Measurement):
    """BLEU and chrF of greedy translations of `samples` texts, of at most `most` tokens each, by sacrebleu.

    `data` is "phrases", the built-in pairs, or a file of records with the fields `source` and `target`. `batch` texts
    are translated at once.
    """

    name = "translation"
    work = "lighten.evaluate.translation.work:measure"
    needs = frozenset({"translates"})
    tasks: ClassVar[tuple[Task, ...]] = ("seq2seq",)
    of_quality = True

    data: str = pairs.BUILTIN
    samples: int = Field(200, ge=1)
    most: int = Field(128, ge=1)
    batch: int = Field(32, ge=1)

    def pairs(self) -> list[Pair]:
        """Returns the texts with their references.

        Raises:
            RequestError: the data cannot be read.
        """
        return pairs.load(self.data, "test", self.samples)

    def data_digest(self) -> str:
        """Returns the SHA-256 of texts and references."""
        return pairs.digest(self.pairs())

    def key_facts(self) -> dict[str, Any]:
        """Returns the version of sacrebleu, which counts."""
        return {"sacrebleu": version("sacrebleu")}

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if sacrebleu is missing."""
        if find_spec("sacrebleu") is None:
            raise missing_extra("translation", "sacrebleu", "measuring BLEU and chrF")

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of reading the weights once for every token of a batch."""
        found = self.pairs()
        steps = max(len(pair.target) for pair in found) / BYTES_PER_TOKEN * -(-len(found) // self.batch)
        return Estimate(
            seconds=6 + steps * max(0.01, 4.0 * facts.params / READ_PER_SECOND),
            peak_bytes=FIXED_BYTES + 4 * facts.params + 200_000_000,
            disk_bytes=200 * len(found),
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the quality of the translations into a row."""
        row["translation"] = result["translation"]

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Adds nothing. BLEU of a corpus is no mean over texts, which a paired change would be of."""
