"""The default answers of runtimes, so that an added runtime implements only what it does itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from lighten.errors import Failure
from lighten.evaluate.runtimes.batches import Layout, longest_first, read_scores
from lighten.evaluate.runtimes.runtime import Choose, Decoding, Floats, Ids, Question, Score, Text, Timings
from lighten.evaluate.runtimes.wanted import Wanted
from lighten.step import Report, silent


class Defaults:
    """A runtime that shows logits at most. See `Runtime` for the methods."""

    name: str
    options: Mapping[str, str] = {}
    context: int | None = None
    lacks: Mapping[str, str] = {}
    elsewhere: bool = False
    parallel: int = 1
    _lacking: ClassVar[str] = "{} cannot do that: its class has to list what it can do under `capabilities`"

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        raise Failure(self._lacking.format(self.name))

    def hidden(self) -> Floats | None:
        """See `Runtime`: not shown."""
        return None

    def choose(self, context: list[int], endings: list[list[int]]) -> list[Score]:
        """See `Runtime`."""
        return self.choose_many([Question(context, endings)], silent)[0]

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`: every ending alone, by the logits of the whole text."""
        scores: list[list[Score]] = []
        for number, question in enumerate(questions):
            report(number, len(questions), "")
            scores.append([_score(self.logits, question.context, ending) for ending in question.endings])
        report(len(questions), len(questions), "")
        return scores

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`."""
        raise Failure(self._lacking.format(self.name))

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        raise Failure(self._lacking.format(self.name))

    def decode_many(self, prompts: Sequence[list[int]], most: Sequence[int], choose: Choose) -> None:
        """See `Runtime`: one after the other, by `decode`."""
        for number in longest_first(prompts, most):
            decoding = self.decode(prompts[number], most[number])
            token = choose(number, next(decoding))
            while token is not None:
                try:
                    token = choose(number, decoding.send(token))
                except StopIteration:
                    break
            decoding.close()

    def answer_many(self, asked: Sequence[Wanted], report: Report) -> list[str] | None:
        """See `Runtime`: it shows logits."""
        return None

    def text(self, most: int) -> Text:
        """See `Runtime`."""
        raise Failure(f"speculative decoding takes tokens back, which is not done on {self.name}")

    def peak_vram_bytes(self) -> int | None:
        """See `Runtime`: not known."""
        return None

    def close(self) -> None:
        """See `Runtime`: nothing to free."""


def _score(logits: Callable[[Ids], Floats], context: list[int], ending: list[int]) -> Score:
    layout = Layout(Question(context, [ending]))
    return read_scores(logits(layout.ids)[layout.wanted], [layout])[0][0]
