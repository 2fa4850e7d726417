"""The choice among measured variants: filters, one criterion, and a margin within which two are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lighten.model.export_formats import export_format
from lighten.numerics.steady import UNSTEADY
from lighten.recommend.candidate import Candidate, candidate
from lighten.recommend.question import Question
from lighten.recommend.sizes import Sizes
from lighten.report import claims
from lighten.report.claims import BROKEN, Ends
from lighten.report.numbers import byte_count, change
from lighten.report.pareto import sure_front
from lighten.results.results import Results


@dataclass(frozen=True)
class Filter:
    """One condition, and the variants that it removed, with the reason for each."""

    condition: str
    removed: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The pick, the reasons, and the alternatives."""

    pick: Candidate | None
    reasons: tuple[str, ...]
    filters: tuple[Filter, ...]
    runners_up: tuple[Candidate, ...]
    cautions: tuple[str, ...] = ()


def choose(results: Results, question: Question, sizes: Sizes | None) -> Choice:
    """Returns the best measured variant for a question. If none passes, `pick` is None.

    Args:
        results: what was measured.
        question: limits, and what to prefer.
        sizes: sizes of the model; needed for a target or a context.
    """
    left = [candidate(row, results, question, sizes) for row in results.measured if not row.elsewhere]
    filters = []
    for condition, test in _conditions(question):
        tested = [(each, test(each)) for each in left]
        filters.append(Filter(condition, tuple(f"{each.name}: {why}" for each, why in tested if why)))
        left = [each for each, why in tested if not why]
    for condition, test in _claims(question):  # said only where they remove something
        removed = {each.name: why for each in left if (why := test(each))}
        if removed:
            filters.append(Filter(condition, tuple(f"{name}: {why}" for name, why in removed.items())))
        left = [each for each in left if each.name not in removed]
    known = [each for each in left if _value(each, question) is not None]
    if not known:
        why = "nothing that was measured passes" if not left else f"{question.prefer} was not measured on what passes"
        return Choice(None, (why,), tuple(filters), ())
    pick, reasons = _best(known, question)
    return Choice(pick, tuple(reasons), tuple(filters), _runners_up(known, pick, question), _cautions(pick, question))


def _conditions(question: Question) -> list[tuple[str, Callable[[Candidate], str | None]]]:
    found: list[tuple[str, Callable[[Candidate], str | None]]] = []
    if question.purpose == "edge":
        found.append(("a device takes a GGUF file: that is what a bundle holds", _not_for_devices))
    if runtime := question.runtime:
        found.append((f"runs on {runtime}", lambda each: _unless(each.row.runtime == runtime, each.row.runtime or "?")))
    if room := question.room:
        where = f"the {question.target.title} has beside its system" if question.target else "were given"
        if question.target and question.memory == room:
            where = "were given"
        found.append((f"fits the {byte_count(room)} that {where}", lambda each: _too_large(each, room)))
    if (most := question.max_drop) is not None:
        text = f"loses at most {100 * most:g} pp of accuracy"
        found.append((text, lambda each: _too_much(each.drop, most, "pp", "accuracy")))
    if (worst := _worst_rise(question)) is not None:
        text = f"perplexity rises by at most {100 * worst:g} %" + (
            "" if question.max_ppl is not None else " (as usual)"
        )
        found.append(
            (text, lambda each: _too_much(each.rise, worst, "%", "perplexity", other=bool(each.row.vocabulary)))
        )
    return found


def _worst_rise(question: Question) -> float | None:
    """Returns how far perplexity may rise. Without any limit, a broken model is still left out."""
    if question.max_ppl is None and question.max_drop is None and question.prefer != "quality":
        return BROKEN
    return question.max_ppl


def _claims(question: Question) -> list[tuple[str, Callable[[Candidate], str | None]]]:
    """Returns the filters that remove variants whose numbers support no claim."""
    found: list[tuple[str, Callable[[Candidate], str | None]]] = [
        (
            "is not better than its source by more than the interval: something was measured wrongly there",
            lambda each: _unless(not each.too_good, f"perplexity {change(each.rise or 0.0, each.rise_ci95)[0]} %"),
        )
    ]
    if question.prefer == "speed":
        text = f"has a speed whose repeats differ by at most {100 * UNSTEADY:g} %: measure the noisy variants again"
        found.append((text, lambda each: _unless(not each.noisy, "its repeats differ by more")))
    return found


def _not_for_devices(each: Candidate) -> str | None:
    known = export_format(each.row.format)
    return _unless(known is not None and known.for_devices, f"it is {each.row.format}")


def _unless(passes: bool, why: str) -> str | None:
    return None if passes else why


def _too_large(each: Candidate, room: int) -> str | None:
    if each.need is None:
        return "its memory is not known"
    return _unless(each.need <= room, f"takes {byte_count(each.need)}")


def _too_much(value: float | None, most: float, unit: str, what: str, other: bool = False) -> str | None:
    if value is None and other:
        return f"its {what} is that of another vocabulary, which cannot be compared"
    if value is None:
        return f"its {what} was not measured"
    sign = value if unit == "%" else -value
    return _unless(value <= most, f"{change(sign, None, least=1)[0]} {unit}")


def _value(each: Candidate, question: Question) -> float | None:
    """Returns the number that should be small."""
    if question.prefer == "speed":
        return None if each.speed is None else -each.speed
    if question.prefer == "quality":
        return each.rise
    return each.row.size_bytes if question.prefer == "size" else each.need


def _best(known: list[Candidate], question: Question) -> tuple[Candidate, list[str]]:
    def value(each: Candidate) -> float:
        found = _value(each, question)
        assert found is not None
        return found

    ranked = sorted(known, key=lambda each: (value(each), each.name))
    first = ranked[0]
    equal = [each for each in ranked if each is first or _equal(first, each, question)]
    words = {"speed": "fastest", "quality": "best in perplexity", "size": "smallest", "memory": "smallest in memory"}
    how = words[question.prefer]
    if question.prefer == "speed" and question.purpose == "edge" and question.target:
        target = question.target
        how += f" by the memory bandwidth of the {target.title}, {target.bandwidth / 1e9:.1f} GB/s, a ceiling"
    if len(equal) == 1:
        reasons = [f"{first.name} is the {how} of the {len(known)} that pass"]
        if len(ranked) > 1:
            reasons.append(f"the next is {ranked[1].name}: {ranked[1].line()}")
        return first, reasons
    second = "perplexity" if question.prefer == "speed" else "decode speed"
    pick = min(equal, key=lambda each: _second(each, question, equal))
    if second == "decode speed" and not _steady(equal):
        second = "size"
    others = ", ".join(each.name for each in equal if each is not pick)
    return pick, [
        f"{pick.name} and {others} are equally the {how}: they differ by less than their intervals reach",
        f"of these {pick.name} is the best in {second}: {pick.line()}",
    ]


def _equal(first: Candidate, each: Candidate, question: Question) -> bool:
    """Returns whether the measurement cannot distinguish two candidates."""
    pair: tuple[Ends | None, Ends | None] = (None, None)
    if question.prefer == "speed":
        pair = first.speed_ends, each.speed_ends
    elif question.prefer == "quality":
        pair = first.rise_ends, each.rise_ends
    ours, theirs = pair
    if ours and theirs:
        return claims.overlap(ours, theirs)
    return _value(first, question) == _value(each, question)


def _steady(equal: list[Candidate]) -> bool:
    """Whether the decode speeds of all candidates can be compared."""
    return all(each.speed and not each.noisy for each in equal)


def _second(each: Candidate, question: Question, equal: list[Candidate]) -> tuple[float, float, str]:
    size = float(each.row.size_bytes or 0)
    if question.prefer == "speed":
        return (each.rise if each.rise is not None else float("inf"), size, each.name)
    return (-(each.speed or 0.0) if _steady(equal) else 0.0, size, each.name)


def _runners_up(known: list[Candidate], pick: Candidate, question: Question) -> tuple[Candidate, ...]:
    """Returns the candidates that none beats in both the criterion and perplexity (quality: size and perplexity)."""
    others = [each for each in known if each.rise is not None]
    by = "size" if question.prefer == "quality" else question.prefer

    def first(each: Candidate) -> float:
        found = each.row.size_bytes if by == "size" else _value(each, question)
        return float("inf") if found is None else float(found)

    def spans(each: Candidate) -> tuple[Ends, Ends]:
        low, high = each.speed_ends if by == "speed" and each.speed_ends else (-first(each), -first(each))
        return (-high, -low), each.rise_ends or (0.0, 0.0)

    front = sure_front([(first(each), each.rise or 0.0) for each in others], [spans(each) for each in others])
    return tuple(others[at] for at in front if others[at] is not pick)


def _cautions(pick: Candidate, question: Question) -> tuple[str, ...]:
    found = []
    if question.max_drop is not None and pick.drop_high is not None and pick.drop_high > question.max_drop:
        reach = change(-pick.drop_high, None, least=1)[0]
        found.append(f"the 95 % interval of its accuracy reaches {reach} pp: measure more tasks before relying on it")
    worst = _worst_rise(question)
    if worst is not None and pick.rise_ci95 and pick.rise_ci95[1] > worst:
        reach = change(pick.rise_ci95[1], None)[0]
        found.append(
            f"the 95 % interval of its perplexity reaches {reach} %: measure on more text before relying on it"
        )
    return tuple(found)
