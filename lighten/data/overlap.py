"""The overlap of an evaluation text with the calibration text: shared runs of words.

Contamination checks have used runs of 13 words since GPT-3 (Brown et al., 2020, appendix C). Shorter runs meet by
chance. The two built-in texts share no sentence; they have 3 runs of 8 words in common ("the quick brown fox …") and
none of 13.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

NGRAM = 13
"""Number of words of a run. A shorter text counts as one run."""

THRESHOLD = 0.01
"""Share of shared runs above which two texts overlap. Quotations and stock phrases stay far below it."""

EXAMPLES = 3
SHOWN_WORDS = 24

# scripts that write no spaces between words: every character counts as one
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Overlap:
    """The share of the runs of `ngram` words that were found, their number, and the longest shared passages."""

    ngram: int
    share: float
    runs: int
    examples: tuple[str, ...] = ()


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def overlap(calibration: str, evaluation: Iterable[str], ngram: int = NGRAM) -> Overlap:
    """Returns how many of the evaluation texts' runs of words occur in the calibration text.

    Args:
        calibration: the whole text that was used.
        evaluation: separate texts, such as one per task; no run goes from one text to the next.
        ngram: words of a run. A text with fewer words is one run of all its words; an empty text has no run.
    """
    known = words(calibration)
    # only as long as the shorter texts need: most sets have none
    seen = {ngram: set(_runs(known, ngram))}
    count = found = 0
    passages: set[tuple[str, ...]] = set()
    for text in evaluation:
        own = words(text)
        size = min(ngram, len(own))
        if not size:
            continue
        if size not in seen:
            seen[size] = set(_runs(known, size))
        hits = [*map(seen[size].__contains__, _runs(own, size))]
        count += len(hits)
        if any(hits):
            found += sum(hits)
            passages.update(tuple(own[start:stop]) for start, stop in _passages(hits, size))
    longest = sorted(passages, key=lambda passage: (-len(passage), passage))[:EXAMPLES]
    return Overlap(ngram, found / count if count else 0.0, count, tuple(map(_shown, longest)))


def _runs(sequence: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[start:] for start in range(size)), strict=False)


def _passages(hits: Sequence[bool], size: int) -> Iterator[tuple[int, int]]:
    """Yields the first word and the end of every passage of consecutive hits."""
    start = None
    for position, hit in enumerate([*hits, False]):
        if hit and start is None:
            start = position
        elif not hit and start is not None:
            yield start, position - 1 + size
            start = None


def _shown(passage: tuple[str, ...]) -> str:
    return " ".join(passage[:SHOWN_WORDS]) + (" …" if len(passage) > SHOWN_WORDS else "")
