"""Limits of a comparison: `ppl > +2%`, `acc < -1pp`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lighten.compare.difference import Change, Difference, Rate
from lighten.errors import RequestError
from lighten.evaluate.intervals import Interval
from lighten.report.numbers import fixed

RISES = ("ppl", "size", "memory")
"""Quantities that are worse when they rise, in percent of the first side."""
FALLS = ("decode",)
"""Quantities that are worse when they fall, in percent of the first side."""
POINTS = ("acc", "acc_norm")
"""Quantities that are worse when they fall, in percentage points."""
FORMS = '"ppl > +2%", "size > +0%", "memory > +10%", "decode < -10%", "acc < -1pp", "acc_norm < -1pp"'
_FORM = re.compile(r"\s*([A-Za-z_]+)\s*([<>])\s*([+-]?)\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%|pp)\s*")


@dataclass(frozen=True)
class Limit:
    """A change from which a comparison fails. `value` is a fraction."""

    text: str
    quantity: str
    value: float


@dataclass(frozen=True)
class Verdict:
    """The verdict on a limit. `excluded` says whether the interval leaves no doubt (None: no interval)."""

    limit: str
    failed: bool
    excluded: bool | None
    sentence: str


def parse(text: str) -> Limit:
    """Returns the limit that an expression states.

    Raises:
        RequestError: the expression cannot be read; the message lists the possible forms.
    """
    found = _FORM.fullmatch(text)
    if not found:
        raise RequestError(f"cannot read --fail-if {text!r}; the forms are {FORMS}")
    quantity, way, sign, digits, unit = found.groups()
    if quantity not in (*RISES, *FALLS, *POINTS):
        known = ", ".join((*RISES, *FALLS, *POINTS))
        raise RequestError(f"--fail-if {text!r}: there is no quantity {quantity!r}, there is {known}; forms: {FORMS}")
    worse = ">" if quantity in RISES else "<"
    if way != worse:
        gets = "rises" if worse == ">" else "falls"
        raise RequestError(f"--fail-if {text!r}: {quantity} is worse when it {gets}: write {quantity} {worse} …")
    expected = "pp" if quantity in POINTS else "%"
    if unit != expected:
        raise RequestError(f"--fail-if {text!r}: a change of {quantity} is given in {expected}; forms: {FORMS}")
    return Limit(text.strip(), quantity, float(f"{sign}{digits}") / 100)


def judge(limit: Limit, difference: Difference) -> list[Verdict]:
    """Returns the verdicts on a limit: one, or for accuracy one for each set of tasks.

    Raises:
        RequestError: the quantity was not measured on both sides.
    """
    changes = _changes(limit.quantity, difference)
    if not changes:
        why = f" ({'; '.join(difference.notes)})" if difference.notes else ""
        raise RequestError(
            f"--fail-if {limit.text!r} cannot be judged: {limit.quantity} was not measured alike on both "
            f"{difference.a} and {difference.b}{why}"
        )
    return [_verdict(limit, name, change, difference.b) for name, change in changes]


def _changes(quantity: str, difference: Difference) -> list[tuple[str, Interval]]:
    """Returns the changes of a quantity, relative or in fractions, by name."""
    if quantity in POINTS:
        rates = [(task.task, getattr(task, quantity)) for task in difference.accuracy]
        return [(f"{quantity} on {name}", rate.difference) for name, rate in rates if isinstance(rate, Rate)]
    change = getattr(difference, "perplexity" if quantity == "ppl" else quantity)
    if not isinstance(change, Change):
        return []
    ci95 = change.ratio.ci95
    return [(quantity, Interval(change.ratio.value - 1, (ci95[0] - 1, ci95[1] - 1) if ci95 else None))]


def _verdict(limit: Limit, name: str, change: Interval, b: str) -> Verdict:
    rises = limit.quantity in RISES
    failed = change.value > limit.value if rises else change.value < limit.value
    unit = "pp" if limit.quantity in POINTS else "%"
    interval, excluded = ", no interval", None
    if change.ci95:
        low, high = change.ci95
        excluded = low == high or not low <= limit.value <= high  # a point leaves no doubt
        doubt = "excludes the limit" if excluded else "does not exclude the limit: measure on more to be sure"
        interval = f", 95 % interval [{_percent(low)}, {_percent(high)}] {unit}" + (
            "" if low == high else f", which {doubt}"
        )
    sentence = f"{'FAILED' if failed else 'ok'}: {limit.text}: {b} has {_percent(change.value)} {unit} {name}{interval}"
    return Verdict(limit.text, failed, excluded, sentence)


def _percent(value: float) -> str:
    return fixed(100 * value, 2, sign=True)
