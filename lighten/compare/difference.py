"""What changed from one side to the other: numbers, with intervals if single values were kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighten.compare.flips import Flip, flips
from lighten.compare.protocol import same_machine
from lighten.compare.side import Side
from lighten.evaluate import paired
from lighten.evaluate.intervals import Interval, bootstrap_ratio, mcnemar
from lighten.report import claims
from lighten.report.serving import alike, speeds_apart
from lighten.results.measured import Accuracy, Speed


@dataclass(frozen=True)
class Change:
    """A positive quantity on both sides; `ratio` is b / a."""

    a: float
    b: float
    ratio: Interval
    units: int | None = None
    """Values that the interval was drawn from: chunks of text."""


@dataclass(frozen=True)
class Rate:
    """A fraction of right answers on both sides. `gained`, `lost` and `p` are None if only totals are known."""

    a: float
    b: float
    difference: Interval
    gained: int | None = None
    lost: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Task:
    """One set of tasks: the likeliest ending, and the likeliest ending per character."""

    task: str
    n: int
    acc: Rate | None
    acc_norm: Rate | None
    flips: tuple[Flip, ...] = ()
    """Tasks that flipped, by `acc_norm`."""


@dataclass(frozen=True)
class Difference:
    """Everything that changed from a to b. None was not measured on both sides."""

    a: str
    b: str
    perplexity: Change | None
    accuracy: tuple[Task, ...]
    size: Change | None
    memory: Change | None
    decode: Change | None
    notes: tuple[str, ...]


def compare(a: Side, b: Side) -> Difference:
    """Returns what changed from `a` to `b`, which were measured alike."""
    notes: list[str] = []
    return Difference(
        a.text,
        b.text,
        _perplexity(a, b, notes),
        tuple(_accuracy(a, b, notes)),
        _change(a.row.size_bytes, b.row.size_bytes),
        _change(*(side.row.memory.peak_rss_bytes if side.row.memory else None for side in (a, b))),
        _decode(a, b, notes),
        tuple(notes),
    )


def _change(a: float | None, b: float | None) -> Change | None:
    return Change(a, b, Interval(b / a, None)) if a and b else None


def _perplexity(a: Side, b: Side, notes: list[str]) -> Change | None:
    if not (a.row.perplexity and b.row.perplexity):
        _missing("perplexity", a.row.perplexity, b.row.perplexity, a, b, notes)
        return None
    ours, theirs = a.row.perplexity.value, b.row.perplexity.value
    if not (a.perplexity and b.perplexity):
        notes.append("perplexity has no interval: the values of single chunks are not in the store")
        return _change(ours, theirs)
    stored = [paired.values(side.perplexity.path) for side in (a, b) if side.perplexity]
    if "words" in stored[0]:
        notes.append("perplexity has no interval: lm-eval's protocol scores whole documents")
        return _change(ours, theirs)
    first, second = (values["nll"] for values in stored)
    ratio = bootstrap_ratio(second, first)
    if ratio.ci95 is None:
        notes.append(f"perplexity has no interval: {len(first)} chunks are too few")
    return Change(ours, theirs, ratio, len(first))


def _accuracy(a: Side, b: Side, notes: list[str]) -> list[Task]:
    ours, theirs = ({each.task: each for each in side.row.accuracy} for side in (a, b))
    for name in sorted(ours.keys() ^ theirs.keys()):
        _missing(name, ours.get(name), theirs.get(name), a, b, notes)
    return [_task(name, ours[name], theirs[name], a, b, notes) for name in ours if name in theirs]


def _task(name: str, ours: Accuracy, theirs: Accuracy, a: Side, b: Side, notes: list[str]) -> Task:
    if not (name in a.accuracy and name in b.accuracy):
        notes.append(f"{name} has no interval: the answers to single tasks are not in the store")
        plain, normalized = ((getattr(ours, key), getattr(theirs, key)) for key in ("acc", "acc_norm"))
        return Task(name, ours.n, _plain(*plain), _plain(*normalized))
    before, after = (paired.values(side.accuracy[name].path) for side in (a, b))
    if "choice_norm" not in before or "choice_norm" not in after:
        notes.append(f"{name} has no interval: lm-eval scored it, and only what it reports is kept")
        return Task(name, ours.n, _plain(ours.acc, theirs.acc), _plain(ours.acc_norm, theirs.acc_norm))
    found, why = flips(a.accuracy[name], before, after)
    if why:
        notes.append(f"the text of {name} is not shown: {why}")
    return Task(name, ours.n, _rate(before, after, "choice"), _rate(before, after, "choice_norm"), tuple(found))


def _plain(a: float | None, b: float | None) -> Rate | None:
    return None if a is None or b is None else Rate(a, b, Interval(b - a, None))


def _rate(before: Mapping[str, Any], after: Mapping[str, Any], choice: str) -> Rate | None:
    if choice not in before or choice not in after:
        return None
    was, now = (values[choice] == values["label"] for values in (before, after))
    found = mcnemar(int((~was & now).sum()), int((was & ~now).sum()), len(was))
    return Rate(float(was.mean()), float(now.mean()), found.difference, found.gained, found.lost, found.p)


def _decode(a: Side, b: Side, notes: list[str]) -> Change | None:
    def keyed(rows: list[Speed]) -> dict[tuple[int, int, int], Speed]:
        return {(row.batch, row.prompt, row.generate): row for row in rows}

    ours, theirs = keyed(a.row.speed), keyed(b.row.speed)
    if not ours or not theirs:
        _missing("decode speed", ours, theirs, a, b, notes)
        return None
    if not same_machine(a, b):
        notes.append("decode speeds are not compared: they were measured on different machines or devices")
        return None
    common = [key for key in ours if key in theirs]
    if not common:
        notes.append("decode speeds are not compared: no batch size, prompt and length were measured on both")
        return None
    first, second = ours[common[0]], theirs[common[0]]
    if None not in (*first.how, *second.how) and first.how != second.how:
        notes.append(f"decode speeds are of {_how(first)} in {a.text} and of {_how(second)} in {b.text}")
    elif a.row.key and a.row.key == b.row.key and alike(first, second) and (line := speeds_apart(first, second)):
        notes.append(f"both are the same artifact, and {line}")
    loud = [side.text for side, speed in ((a, first), (b, second)) if claims.noisy(speed)]
    if loud:
        spread = max(first.spread or 0.0, second.spread or 0.0)
        notes.append(
            f"decode speeds are not compared: the repeats of {' and '.join(loud)} differ by up to "
            f"{100 * spread:.0f} %, so measure again on a quiet machine"
        )
        return None
    if not (first.decode_tok_s and second.decode_tok_s):
        return None
    interval = claims.ratio_ends(second, first)
    if interval and interval[0] <= 1 <= interval[1]:
        notes.append("the decode speeds differ by less than their intervals reach")
    return Change(first.decode_tok_s, second.decode_tok_s, Interval(second.decode_tok_s / first.decode_tok_s, interval))


def _how(speed: Speed) -> str:
    """Returns the options of transformers in words."""
    names = ("attention", "compile", "cache")
    return ", ".join(f"{name} {value}" for name, value in zip(names, speed.how, strict=True))


def _missing(what: str, ours: Any, theirs: Any, a: Side, b: Side, notes: list[str]) -> None:
    if bool(ours) != bool(theirs):
        notes.append(f"{what} was not measured on {(b if ours else a).text}")
