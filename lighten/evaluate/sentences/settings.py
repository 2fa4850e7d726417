"""Speed of whole sentences: settings, prediction and columns of a row."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from lighten.data import pairs, text
from lighten.data.origin import Text
from lighten.errors import RequestError
from lighten.evaluate.measurement import FIXED_BYTES, READ_PER_SECOND, Measurement
from lighten.evaluate.speed.settings import Counts
from lighten.facts import ModelFacts, Task
from lighten.step import Estimate


class OfSentences(Measurement):
    """A measurement on `samples` sentences of `data`."""

    data: Text = "builtin"
    samples: int = Field(200, ge=1)

    def sentences(self) -> list[str]:
        """Returns the sentences.

        Raises:
            RequestError: the data cannot be read, or has no sentences.
        """
        if pairs.is_pairs(self.data):
            return [pair.source for pair in pairs.load(str(self.data), "test", self.samples)]
        return sentences_of(text.load_text(self.data, "perplexity"), self.samples)

    def data_digest(self) -> str:
        """Returns the SHA-256 of the sentences."""
        return text.digest("\n".join(self.sentences()))


class Sentences(OfSentences):
    """Time from a text to its translation or its vector: at p50, p95 and p99, and in sentences a second.

    `samples` sentences of `data` run in batches of each size in `batch`, `repeats` times. Translations have at most
    `most` tokens.
    """

    name = "sentences"
    work = "lighten.evaluate.sentences.work:measure"
    needs = frozenset({"translates", "encodes"})
    tasks: ClassVar[tuple[Task, ...]] = ("seq2seq", "masked", "embedding", "other")
    timed = True

    data: Text = pairs.BUILTIN
    samples: int = Field(64, ge=2)
    batch: Counts = Field([1, 16])
    repeats: int = Field(2, ge=1)
    most: int = Field(128, ge=1)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of reading the weights for every sentence, and for every token of a translation."""
        passes = 20 if facts.task == "seq2seq" else 1
        runs = (self.repeats + 1) * self.samples * passes * sum(1 / each for each in self.batch)
        return Estimate(
            seconds=8 + 2 * runs * max(0.008, 4.0 * facts.params / READ_PER_SECOND),
            peak_bytes=FIXED_BYTES + 4 * facts.params + 200_000_000,
            disk_bytes=10_000,
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts speed and memory into a row."""
        row |= {name: result[name] for name in ("sentences", "memory")}


def sentences_of(whole: str, most: int) -> list[str]:
    """Returns sentences of a text, evenly spread over it: what ends with a full stop and has 5 to 60 words.

    Raises:
        RequestError: there are none.
    """
    lines = (line.strip() for line in whole.replace(" . ", " .\n").replace(". ", ".\n").splitlines())
    found = [line for line in lines if line.endswith(".") and 5 <= len(line.split()) <= 60]
    if not found:
        raise RequestError("the text has no sentences of 5 to 60 words that end with a full stop")
    count = min(most, len(found))
    return [found[place * len(found) // count] for place in range(count)]
