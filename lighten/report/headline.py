"""One sentence: which artifact to ship, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.report.numbers import byte_count, change, ratio, significant
from lighten.report.results import Results, Variant

TOLERANCE = 0.01
"""Relative rise in perplexity that still counts as the same quality."""

BROKEN = 0.25
"""Relative rise from which a variant is not worth naming beside the one to ship."""


@dataclass(frozen=True)
class Headline:
    """The answer: `verdict: cost.`, why, and what else could be shipped. `pick` names the variant, if there is one."""

    verdict: str
    cost: str
    reason: str
    others: tuple[str, ...] = ()
    pick: str | None = None

    @property
    def sentence(self) -> str:
        """The verdict and its cost as one sentence."""
        return f"{self.verdict}: {self.cost}."


def headline(results: Results) -> Headline:
    """Returns the smallest variant within 1 % of the baseline's perplexity, or says why there is none.

    Without a baseline the best perplexity measured stands in for it.
    """
    base = results.baseline
    made = [variant for variant in results.measured if variant is not base]
    failed = [variant.name for variant in results.variants if variant.failed]
    line = f"{len(failed)} of {len(results.variants)} variants failed: {', '.join(failed)}."
    broken = (line,) if failed else ()
    if not made and failed:
        return Headline("Every variant failed", "there is no artifact to ship", f"{line} The table says why.")
    if not made and not base:
        return Headline("Nothing to ship", "there is no variant", "Nothing was made or measured.")
    if not made or (not base and len(made) == 1):
        only = base or made[0]
        why = "There is nothing to compare it with."
        return Headline(f"Measured {only.name}", _cost(results, only) or "no sizes", why, broken)
    if base and base.size_bytes:
        made = [variant for variant in made if (variant.size_bytes or 0) < (base.size_bytes or 0)]
    sized = sorted((variant for variant in made if variant.size_bytes), key=lambda v: (v.size_bytes or 0, v.name))
    if not sized:
        why = (
            f"The baseline takes {byte_count(base.size_bytes)}."
            if base and base.size_bytes
            else "No size was measured."
        )
        return Headline("Nothing smaller", "no variant is known to be smaller than the baseline", why, broken)
    rises = {variant.name: rise for variant in sized if (rise := _rise(results, variant)) is not None}
    if not rises:
        smallest = sized[0]
        why = "Perplexity was not measured on it and on something to compare with, so its quality is not known."
        if smallest.vocabulary:
            why = "Its vocabulary is not the baseline's, so their perplexities cannot be compared: see bits per byte."
        return Headline(f"Smallest is {smallest.name}", _cost(results, smallest), why, broken, smallest.name)
    against = "the baseline's perplexity" if base else "the best perplexity measured (there is no baseline)"
    usable = [variant for variant in sized if rises.get(variant.name, BROKEN) < BROKEN]
    fitting = [variant for variant in sized if rises.get(variant.name, TOLERANCE + 1) <= TOLERANCE]
    if not fitting:
        closest = min((v for v in sized if v.name in rises), key=lambda v: (rises[v.name], v.size_bytes, v.name))
        others = _others(results, usable, closest) + broken
        reason = f"No variant that is smaller stays within {TOLERANCE:.0%} of {against}.".replace("%", " %")
        return Headline(f"Closest is {closest.name}", _cost(results, closest), reason, others, closest.name)
    pick = fitting[0]
    reason = f"It is the smallest variant within {TOLERANCE:.0%} of {against}.".replace("%", " %")
    delta = results.perplexity_change(pick)
    if delta and delta.ci95 and delta.ci95[1] > TOLERANCE:
        reach = change(delta.ci95[1], None)[0]
        reason += f" Its 95 % interval reaches {reach} %: measure on more text before relying on it."
    others = _others(results, usable, pick) + broken
    return Headline(f"Ship {pick.name}", _cost(results, pick), reason, others, pick.name)


def _rise(results: Results, variant: Variant) -> float | None:
    """Returns the relative rise in perplexity over the baseline, or over the best variant if there is none."""
    if results.baseline:
        delta = results.perplexity_change(variant)
        return delta.relative if delta else None
    ours = variant.perplexity
    if ours is None or variant.vocabulary:
        return None
    others = [other.perplexity for other in results.measured if other.perplexity and not other.vocabulary]
    alike = [other.value for other in others if other.comparable(ours)]
    return ours.value / min(alike) - 1 if len(alike) == len(others) else None


def _cost(results: Results, variant: Variant) -> str:
    """Returns size, perplexity and speed in words, each against the baseline where there is one."""
    base, parts = results.baseline, []
    if variant.size_bytes:
        instead = (
            f" instead of {byte_count(base.size_bytes)}" if base and base is not variant and base.size_bytes else ""
        )
        parts.append(byte_count(variant.size_bytes) + instead)
    delta = results.perplexity_change(variant)
    if delta:
        parts.append(f"{change(delta.relative, delta.ci95)[0]} % perplexity")
    elif variant.perplexity:
        by = "" if variant.perplexity.by == "lighten" else f" ({variant.perplexity.by})"
        parts.append(f"perplexity {significant(variant.perplexity.value, 4)}{by}")
        if variant.vocabulary and variant.bits_per_byte and base and base.bits_per_byte:
            pair = [significant(each.bits_per_byte or 0.0, 4) for each in (variant, base)]
            parts[-1] = f"{pair[0]} bits per byte instead of {pair[1]}"
    speed = results.decode_ratio(variant)
    if speed is not None:
        parts.append(f"{ratio(speed)} the decode speed")
    return ", ".join(parts)


def _others(results: Results, sized: list[Variant], pick: Variant) -> tuple[str, ...]:
    """Returns a sentence for the smallest and the fastest variant, where they are not the pick."""
    found: list[str] = []
    if not sized:
        return ()
    if sized[0] is not pick:
        found.append(f"Smallest: {sized[0].name}, {_cost(results, sized[0])}.")
    fast = max(sized, key=lambda v: v.decode_tok_s or 0.0)
    if fast.decode_tok_s and fast not in (pick, sized[0]) and fast.decode_tok_s > (pick.decode_tok_s or 0.0):
        found.append(f"Fastest: {fast.name}, {_cost(results, fast)}.")
    return tuple(found)
