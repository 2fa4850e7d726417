"""The columns of models that read whole texts: translations, and the speed of sentences."""

from __future__ import annotations

from lighten.report.cell import Cell, Column
from lighten.report.numbers import fixed, significant
from lighten.results.results import Results, Variant


def text_columns(results: Results) -> list[Column]:
    """Returns the columns of what was measured on whole texts."""
    found = []
    if any(v.translation for v in results.measured):
        found += _TRANSLATION
    if any(v.similarity for v in results.measured):
        found.append(_SIMILARITY)
    if any(v.masked for v in results.measured):
        found.append(_MASKED)
    sizes = dict.fromkeys(each.batch for v in results.measured for each in v.sentences)
    return [*found, *(column for size in sizes for column in _speeds(size))]


def _speeds(size: int) -> list[Column]:
    """Returns the columns of a size of a batch."""
    named = "" if size == 1 else f" × {size}"
    return [
        Column(
            f"latency-{size}",
            f"Sentence{named}",
            "ms",
            "lower",
            6 if size == 1 else 11,
            f"Time of {'a sentence' if size == 1 else f'{size} sentences at once'}, from text to text or vector: "
            "the median, and the 95th and 99th percentile.",
            lambda v: _latency(v, size),
        ),
        Column(
            f"sentences-{size}",
            f"Sentences/s{named}",
            "",
            "higher",
            8,
            f"Sentences in a second, {size} at once.",
            lambda v: _rate(v, size),
        ),
    ]


def _number(value: float | None) -> Cell:
    return Cell() if value is None else Cell(fixed(value, 1), (), value)


def _bleu(v: Variant) -> Cell:
    if not v.translation:
        return Cell()
    low, high = v.translation.ci95 or (None, None)
    details = () if low is None or high is None else (f"{fixed(low, 1)} to {fixed(high, 1)}",)
    margin = 0.0 if low is None or high is None else (high - low) / 2
    return Cell(fixed(v.translation.bleu, 1), details, v.translation.bleu, margin)


def _similarity(v: Variant) -> Cell:
    found = v.similarity
    return Cell(fixed(found.mean, 4), (fixed(found.least, 4),), found.mean) if found else Cell()


def _masked(v: Variant) -> Cell:
    if not v.masked:
        return Cell()
    half = 50 * (v.masked.ci95[1] - v.masked.ci95[0]) if v.masked.ci95 else 0.0
    return Cell(fixed(100 * v.masked.acc, 1), (f"± {fixed(half, 1)}",), v.masked.acc, half / 100)


def _latency(v: Variant, size: int) -> Cell:
    found = next((each.latency_ms for each in v.sentences if each.batch == size), None)
    if not found:
        return Cell()
    return Cell(significant(found.p50, 3), (f"{significant(found.p95, 3)}, {significant(found.p99, 3)}",), found.p50)


def _rate(v: Variant, size: int) -> Cell:
    found = next((each.sentences_s for each in v.sentences if each.batch == size), None)
    return Cell() if found is None else Cell(significant(found, 3), (), found)


_TRANSLATION = [
    Column(
        "bleu",
        "BLEU",
        "",
        "higher",
        3,
        "Runs of one to four words that translations share with references, from 0 to 100, with the 95 % interval.",
        _bleu,
    ),
    Column(
        "chrf",
        "chrF",
        "",
        "higher",
        6,
        "Runs of one to six letters that translations share with their references, from 0 to 100.",
        lambda v: _number(v.translation.chrf if v.translation else None),
    ),
]
_SIMILARITY = Column(
    "similarity",
    "Cosine",
    "",
    "higher",
    3,
    "Likeness of embeddings to the baseline's: the mean cosine, and the least.",
    _similarity,
)
_MASKED = Column(
    "masked", "Gaps filled", "%", "higher", 3, "Hidden tokens that it finds, ± half the 95 % interval.", _masked
)
