"""Writing texts on any runtime: each next token, and where to stop."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lighten.evaluate.runtimes.runtime import Floats, Runtime, Tokenizer
from lighten.evaluate.runtimes.wanted import SEED, Wanted
from lighten.step import Report


class _Answer:
    """A text that is being written."""

    def __init__(self, wanted: Wanted, number: int) -> None:
        self._wanted = wanted
        self._stops = [stop for stop in wanted.stops if stop]
        self._written: list[int] = []
        self._rng = np.random.default_rng((SEED, number))
        # a letter has four tokens at most, of a byte each
        self._tail = 8 + 4 * max(map(len, self._stops), default=0)

    def add(self, logits: Floats, tokenizer: Tokenizer, ends: Collection[int]) -> int | None:
        """Chooses a token for logits `[vocab]`. Returns None if the text ends with it or before it."""
        token = self._wanted.sampling.choose(logits, self._rng)
        if token in ends:
            return None
        self._written.append(token)
        full = len(self._written) == self._wanted.most
        return None if full or self._stopped(tokenizer.decode(self._written[-self._tail :])) else token

    def _stopped(self, text: str) -> bool:
        return any(stop in text for stop in self._stops)

    def text(self, tokenizer: Tokenizer) -> str:
        """Returns the text up to the first of the texts that end it."""
        return self._wanted.cut(tokenizer.decode(self._written))


def write(
    runtime: Runtime, tokenizer: Tokenizer, ends: Collection[int], asked: Sequence[Wanted], report: Report
) -> list[str]:
    """Returns what a model writes for each request.

    Every request draws from a generator of its own, seeded by its number. So neither the order nor the size of batches
    changes a text.

    Args:
        runtime: the model.
        tokenizer: makes text of tokens.
        ends: ids that end a text.
        asked: the requests.
        report: told the number of finished requests.
    """
    answers = [_Answer(each, number) for number, each in enumerate(asked)]
    done = 0

    def choose(number: int, logits: Floats) -> int | None:
        nonlocal done
        token = answers[number].add(logits, tokenizer, ends)
        if token is None:
            done += 1
            report(done, len(asked), "")
        return token

    if (texts := runtime.answer_many(asked, report)) is not None:
        return [each.cut(text) for each, text in zip(asked, texts, strict=True)]
    report(0, len(asked), "")
    runtime.decode_many([each.prompt for each in asked], [each.most for each in asked], choose)
    return [answer.text(tokenizer) for answer in answers]
