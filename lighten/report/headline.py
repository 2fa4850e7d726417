"""One sentence: which artifact to ship, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.report import claims, whole_texts
from lighten.report.claims import BROKEN, TOLERANCE
from lighten.report.numbers import byte_count, change, ratio, significant
from lighten.results.results import Results, Variant

WITHIN = f"{100 * TOLERANCE:g} %"


@dataclass(frozen=True)
class Headline:
    """The answer: `verdict: cost.`, the reason, and the alternatives. `pick` names the variant, if there is one."""

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

    It says "Ship" only if the whole interval is within 1 % and no speed in the sentence is noisy. Otherwise it says
    "Perhaps". Without a baseline, the best measured perplexity takes its place.
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
    return _judged(results, sized, broken)


def _judged(results: Results, sized: list[Variant], broken: tuple[str, ...]) -> Headline:
    """Returns the headline for variants that are smaller than the baseline, smallest first, by their perplexity."""
    rises = {variant.name: rise for variant in sized if (rise := claims.rise(results, variant)) is not None}
    if not rises:
        smallest = sized[0]
        if told := _by_texts(results, sized, broken):
            return told
        why = "Perplexity was not measured on it and on something to compare with, so its quality is not known."
        if smallest.vocabulary:
            why = "Its vocabulary is not the baseline's, so their perplexities cannot be compared: see bits per byte."
        return Headline(f"Smallest is {smallest.name}", _cost(results, smallest), why, broken, smallest.name)
    wrong = {variant.name: bug for variant in sized if (bug := claims.bug(results, variant))}
    known = [variant for variant in sized if variant.name in rises and variant.name not in wrong]
    suspects = (*wrong.values(), *broken)
    if not known:
        first = next(variant for variant in sized if variant.name in wrong)
        return Headline(f"Check {first.name}", _cost(results, first), wrong[first.name], suspects[1:])
    base = results.baseline
    against = "the baseline's perplexity" if base else "the best perplexity measured (there is no baseline)"
    usable = [variant for variant in known if rises[variant.name].relative < BROKEN]
    fitting = [variant for variant in known if rises[variant.name].relative <= TOLERANCE]
    if not fitting:
        closest = min(known, key=lambda v: (rises[v.name].relative, v.size_bytes, v.name))
        reason = f"No variant that is smaller stays within {WITHIN} of {against}."
        others = _others(results, usable, closest) + suspects
        return Headline(f"Closest is {closest.name}", _cost(results, closest), reason, others, closest.name)
    sure = [variant for variant in fitting if claims.within(rises[variant.name], TOLERANCE)]
    pick = (sure or fitting)[0]
    included = " with its whole interval" if pick is not fitting[0] else ""
    unknown = "" if sure else _reaching(rises[pick.name].ci95)
    noise = claims.noise([pick, base]) if base and claims.decode_pair(results, pick) else ""
    reason = f"It is the smallest variant within {WITHIN} of {against}{included}."
    verb = "Perhaps" if unknown or noise else "Ship"
    said = " ".join(filter(None, (reason, unknown, noise)))
    others = _others(results, usable, pick) + suspects
    return Headline(f"{verb} {pick.name}", _cost(results, pick), said, others, pick.name)


def _by_texts(results: Results, sized: list[Variant], broken: tuple[str, ...]) -> Headline | None:
    """Returns the headline for models that read whole texts; None if nothing of the kind was measured."""
    base = results.baseline
    known = [(each, found) for each in sized if (found := whole_texts.quality(each, base))]
    if not known:
        return None
    fitting = [(each, found) for each, found in known if found.loss <= TOLERANCE]
    others = tuple(f"Also: {each.name}, {_cost(results, each)}." for each, _ in known)
    if not fitting:
        closest = min(known, key=lambda pair: pair[1].loss)[0]
        rest = tuple(said for said, (each, _) in zip(others, known, strict=True) if each is not closest)
        why = f"No variant that is smaller keeps all but {WITHIN} of what was measured on whole texts."
        return Headline(f"Closest is {closest.name}", _cost(results, closest), why, rest + broken, closest.name)
    pick, found = fitting[0]
    rest = tuple(said for said, (each, _) in zip(others, known, strict=True) if each is not pick)
    reason = f"It is the smallest variant that keeps all but {WITHIN} of what was measured on whole texts."
    sure = found.loss + found.margin <= TOLERANCE
    reason += "" if sure else " Its 95 % interval reaches beyond that: measure on more text before relying on it."
    return Headline(
        f"{'Ship' if sure else 'Perhaps'} {pick.name}", _cost(results, pick), reason, rest + broken, pick.name
    )


def _reaching(interval: tuple[float, float] | None) -> str:
    """Returns why a rise that is small enough is not certain."""
    if interval is None:
        return "Without an interval that may be chance: measure it beside a baseline, on more text."
    return f"Its 95 % interval reaches {change(interval[1], None)[0]} %: measure on more text before relying on it."


def _cost(results: Results, variant: Variant) -> str:
    """Returns size, perplexity and speed in words, each compared with the baseline if there is one."""
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
    if not variant.perplexity and (kept := whole_texts.quality(variant, base)):
        parts.append(kept.words)
    if sentences := whole_texts.speed(variant, base):
        parts.append(sentences)
    speed = claims.decode_ratio(results, variant)
    if speed is not None:
        parts.append(f"{ratio(speed)} the decode speed")
    elif why := claims.no_ratio(results, variant):
        parts.append(why)
    return ", ".join(parts)


def _others(results: Results, sized: list[Variant], pick: Variant) -> tuple[str, ...]:
    """Returns a sentence for the smallest variant and for the fastest one, if they are not the pick."""
    found: list[str] = []
    if not sized:
        return ()
    if sized[0] is not pick:
        rise = claims.rise(results, sized[0])
        unknown = f" {_reaching(rise.ci95)}" if rise and rise.relative <= TOLERANCE else ""
        found.append(f"Smallest: {sized[0].name}, {_cost(results, sized[0])}.{unknown}")
    quicker = [each for each in sized if each.speed and pick.speed and claims.faster(each.speed[0], pick.speed[0])]
    fast = max(quicker, key=lambda v: v.decode_tok_s or 0.0, default=pick)
    if fast not in (pick, sized[0]):
        found.append(f"Fastest: {fast.name}, {_cost(results, fast)}.")
    return tuple(found)
