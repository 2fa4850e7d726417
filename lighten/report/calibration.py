"""The overlap of the calibration text with the texts that quality was measured on, in words."""

from __future__ import annotations

from lighten.data.overlap import THRESHOLD
from lighten.report.numbers import share, significant
from lighten.results.results import Calibration, Overlap, Results


def overlaps(results: Results) -> tuple[str, ...]:
    """Returns a sentence for every evaluation set that overlaps with the calibration text."""
    found = results.calibration.overlap if results.calibration else []
    return tuple(
        f"Calibration overlaps {each.with_}: {_percent(each.share)} of its {each.ngram}-grams; "
        "what was measured on it is flattered."
        for each in found
        if each.share > THRESHOLD
    )


def amount(calibration: Calibration) -> str:
    """Returns how much text was used: "builtin: 31 of 64 samples of 512 tokens, 15,872 tokens …"."""
    asked = f" of {calibration.asked:,}" if calibration.asked not in (None, calibration.samples) else ""
    parts = [f"{calibration.samples:,}{asked} samples of {calibration.length:,}", f"{calibration.tokens:,} tokens"]
    if calibration.distinct is not None and calibration.vocabulary:
        seen = share(calibration.distinct / calibration.vocabulary)
        parts.append(f"{calibration.distinct:,} of them distinct, {seen} % of the vocabulary")
    return f"{calibration.data}: {', '.join(parts)}"


def shared(each: Overlap) -> str:
    """Returns what one evaluation set shares with the calibration text, with examples."""
    if not each.share:
        return f"{each.with_}: none of its {each.ngram}-grams"
    examples = "; ".join(f"“{example}”" for example in each.examples)
    return f"{each.with_}: {_percent(each.share)} of its {each.ngram}-grams" + (f": {examples}" if examples else "")


def _percent(value: float) -> str:
    return f"{significant(100 * value, 2, decimals=2)} %"
