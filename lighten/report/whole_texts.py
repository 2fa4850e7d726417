"""What a variant keeps of a model that reads whole texts: cosine, BLEU or filled gaps, in words."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.report.numbers import fixed, ratio
from lighten.results.measured import Interval
from lighten.results.results import Results, Variant


@dataclass(frozen=True)
class Quality:
    """What was measured, in words; the share that is lost; and half its interval, as a share."""

    words: str
    loss: float
    margin: float = 0.0


def quality(variant: Variant, base: Variant | None) -> Quality | None:
    """Returns what a variant keeps; None if it or the baseline was not measured so."""
    if found := variant.similarity:
        return Quality(f"cosine {fixed(found.mean, 4)}, at least {fixed(found.least, 4)}", 1 - found.mean)
    if variant.translation and base and base.translation and base.translation.bleu > 0:
        ours, theirs = variant.translation.bleu, base.translation.bleu
        words = f"BLEU {fixed(ours, 1)} instead of {fixed(theirs, 1)}"
        return Quality(words, 1 - ours / theirs, _half(variant.translation.ci95) / theirs)
    if variant.masked and base and base.masked and base.masked.acc > 0:
        ours, theirs = variant.masked.acc, base.masked.acc
        words = f"{fixed(100 * ours, 1)} % of gaps filled instead of {fixed(100 * theirs, 1)} %"
        return Quality(words, 1 - ours / theirs, _half(variant.masked.ci95) / theirs)
    return None


def speed(variant: Variant, base: Variant | None) -> str | None:
    """Returns the sentences a second beside the baseline's, in batches of the first size that both have."""
    theirs = {each.batch: each.sentences_s for each in base.sentences} if base and base is not variant else {}
    for each in variant.sentences:
        if theirs.get(each.batch):
            return f"{ratio(each.sentences_s / theirs[each.batch])} the sentences a second (batch {each.batch})"
    return None


def instead(results: Results) -> str:
    """Returns a sentence about what was measured where perplexity was not; "" if nothing of the kind was."""
    said = []
    for variant in results.measured:
        if found := variant.translation:
            said.append(f"BLEU and chrF of {found.n:,} translations")
        if alike := variant.similarity:
            said.append(f"the cosine of the embeddings of {alike.n:,} sentences to the baseline's")
        if gaps := variant.masked:
            said.append(f"the share of {gaps.n:,} hidden tokens that is found")
        if variant.sentences:
            said.append(f"the speed of {variant.sentences[0].n:,} sentences")
    parts = list(dict.fromkeys(said))
    if not parts:
        return ""
    return f"Measured: {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}."


def _half(interval: Interval | None) -> float:
    low, high = interval or (0.0, 0.0)
    return (high - low) / 2
