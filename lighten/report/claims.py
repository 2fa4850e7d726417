"""Rules for what may be claimed of a speed or a perplexity.

Headlines, ratios, marks of the best, Pareto fronts, comparisons and recommendations all use these rules. Nothing is
claimed in four cases: a speed is noisy; the intervals of two speeds overlap; two perplexities have different texts or
vocabularies; a variant is better than the source it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable

from lighten.numerics.steady import UNSTEADY
from lighten.report.numbers import change
from lighten.results.measured import Perplexity, PerplexityDelta, Speed
from lighten.results.results import Results, Variant

Ends = tuple[float, float]
"""Low and high end of an interval."""

TOLERANCE = 0.01
"""Relative rise in perplexity that still counts as the same quality."""

BROKEN = 0.25
"""Relative rise in perplexity from which a variant is not named beside the variant to ship."""

ROUNDING = 0.001
"""Relative fall in perplexity that the arithmetic of two runtimes explains. A copy that falls by more is no copy."""


def noisy(speed: Speed | None) -> bool:
    """Whether a speed is marked because its repeats differ too much for a comparison."""
    return speed is not None and (speed.spread or 0.0) > UNSTEADY


def reach(speed: Speed) -> float:
    """Returns the relative error of a decode speed: half its interval, or half the spread of its repeats."""
    return speed.error if speed.error is not None else (speed.spread or 0.0) / 2


def ends(speed: Speed) -> Ends | None:
    """Returns the interval of a decode speed in tokens per second; None if there is no speed."""
    if not speed.decode_tok_s:
        return None
    return speed.decode_tok_s * (1 - reach(speed)), speed.decode_tok_s * (1 + reach(speed))


def overlap(ours: Ends, theirs: Ends) -> bool:
    """Whether two intervals have a value in common."""
    return ours[0] <= theirs[1] and theirs[0] <= ours[1]


def ratio_ends(ours: Speed, theirs: Speed) -> Ends | None:
    """Returns the interval of the ratio of two decode speeds, from the ends of both; None if one has no error."""
    first, second = ends(ours), ends(theirs)
    known = all(each.error is not None or each.spread is not None for each in (ours, theirs))
    return (first[0] / second[1], first[1] / second[0]) if known and first and second and second[0] > 0 else None


def faster(ours: Speed | None, theirs: Speed | None) -> bool:
    """Whether the first decodes faster than the second and their intervals do not overlap."""
    if ours is None or theirs is None or noisy(ours) or noisy(theirs):
        return False
    first, second = ends(ours), ends(theirs)
    return first is not None and second is not None and first[0] > second[1]


def decode_pair(results: Results, variant: Variant) -> tuple[Speed, Speed] | None:
    """Returns the variant's first speed at a shape that the baseline was also measured at here, and the baseline's."""
    base = results.baseline
    if base is None or variant is base or variant.elsewhere or base.elsewhere:
        return None
    for ours in variant.speed:
        for theirs in base.speed:
            if _shape(ours) == _shape(theirs) and ours.decode_tok_s and theirs.decode_tok_s:
                return ours, theirs
    return None


def decode_ratio(results: Results, variant: Variant) -> float | None:
    """Returns the variant's decode speed / the baseline's; None if one is noisy or their intervals overlap."""
    pair = decode_pair(results, variant)
    if pair is None or any(map(noisy, pair)):
        return None
    ours, theirs = pair
    if not (faster(ours, theirs) or faster(theirs, ours)):
        return None
    return (ours.decode_tok_s or 0.0) / (theirs.decode_tok_s or 1.0)


def no_ratio(results: Results, variant: Variant) -> str:
    """Returns in words why two measured decode speeds have no ratio; empty if they have one."""
    pair = decode_pair(results, variant)
    if pair is None or decode_ratio(results, variant) is not None:
        return ""
    noise = any(map(noisy, pair))
    return "decode speeds too noisy to compare" if noise else "the same decode speed within the intervals"


def noise(variants: Iterable[Variant]) -> str:
    """Returns a sentence about the variants whose first speed is noisy; empty if there is none."""
    found = [(each.name, each.speed[0].spread or 0.0) for each in variants if each.speed and noisy(each.speed[0])]
    if not found:
        return ""
    listed = ", ".join(f"{name} ({100 * spread:.0f} %)" for name, spread in found)
    return (
        f"Decode speeds differ between repeats by more than {100 * UNSTEADY:.0f} %, so they are not compared: "
        f"{listed}. Measure again on a quiet machine."
    )


def perplexity(results: Results, variant: Variant) -> Perplexity | None:
    """Returns the perplexity that may be compared with the baseline's and other variants'.

    None for another protocol, and for another vocabulary: perplexity per token of another vocabulary is on another
    scale.
    """
    base = results.baseline
    if variant.perplexity is None or variant.vocabulary:
        return None
    alike = base is None or base is variant or base.perplexity is None or results.perplexity_change(variant)
    return variant.perplexity if alike else None


def rise(results: Results, variant: Variant) -> PerplexityDelta | None:
    """Returns the change of perplexity from the baseline; without a baseline, from the best measured variant.

    Only a paired change has an interval. None if the two cannot be compared.
    """
    if results.baseline:
        return results.perplexity_change(variant)
    ours = perplexity(results, variant)
    others = [found for each in results.measured if (found := perplexity(results, each))]
    if ours is None or not all(other.comparable(ours) for other in others):
        return None
    best = min(other.value for other in others)
    return PerplexityDelta(relative=ours.value / best - 1, absolute=ours.value - best)


def rise_ends(results: Results, variant: Variant) -> Ends | None:
    """Returns the interval of a variant's rise; a point for the baseline, and if no interval was measured."""
    if variant is results.baseline:
        return (0.0, 0.0)
    found = rise(results, variant)
    return None if found is None else found.ci95 or (found.relative, found.relative)


def within(found: PerplexityDelta, limit: float) -> bool:
    """Whether a rise stays within a limit with its whole interval; False if it has no interval."""
    return found.ci95 is not None and max(found.relative, found.ci95[1]) <= limit


def too_good(results: Results, variant: Variant) -> bool:
    """Whether a variant's perplexity is below its source's by more than the interval.

    No copy can be better than its source. A variant that was trained further can be.
    """
    found = results.perplexity_change(variant)
    if found is None or variant.training or any("distill" in step for step in variant.steps):
        return False
    return found.ci95[1] < -ROUNDING if found.ci95 else found.relative < -TOLERANCE


def bug(results: Results, variant: Variant) -> str:
    """Returns a sentence about a variant that is too good to be a copy of its source; empty if it is not too good."""
    found = results.perplexity_change(variant)
    if found is None or not too_good(results, variant):
        return ""
    text, interval = change(found.relative, found.ci95)
    return (
        f"{variant.name} is better than the baseline by more than the interval ({f'{text} % {interval}'.strip()}). "
        "No copy is better than its source, so something is wrong: the source's weights or tokens, a text that the "
        "variant was made with, or the measurement. Nothing is claimed of it."
    )


def doubts(results: Results) -> tuple[str, ...]:
    """Returns a sentence for everything that was measured and that nothing is claimed of."""
    return tuple(filter(None, (*(bug(results, each) for each in results.measured), noise(results.measured))))


def _shape(speed: Speed) -> tuple[int, int, int]:
    return speed.batch, speed.prompt, speed.generate
