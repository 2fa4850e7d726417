"""The versions of one recipe side by side: perplexity, accuracy, size and speed of each variant over time.

Two numbers are joined only if they were measured alike: by one protocol, on one text, and speeds on one machine.
Otherwise the later number is marked, and a note says what changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import LightenError
from lighten.report.alike import other_protocol, other_setting, other_task, same_machine
from lighten.report.claims import noisy
from lighten.report.numbers import NOT_MEASURED, byte_unit, fixed, significant
from lighten.report.part import Grid, Part
from lighten.report.spark import spark
from lighten.results.file import load
from lighten.results.measured import Accuracy
from lighten.results.results import Results, Variant

BREAK = "‖"
"""Mark before a number that cannot be compared with the number before it."""


@dataclass(frozen=True)
class Point:
    """One number of one version. `why` says why it cannot be compared with the number before; empty if it can."""

    version: str
    value: float | None = None
    text: str = NOT_MEASURED
    why: str = ""


@dataclass(frozen=True)
class Measure:
    """One measure over the versions: a line of points for every variant."""

    title: str
    unit: str
    lines: dict[str, list[Point]]

    @property
    def heading(self) -> str:
        """Heading such as "Size, MB"."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


Value = Callable[[Variant], float | None]
Why = Callable[[Results, Variant, Results, Variant], str]


def history(results: Results, earlier: Sequence[Results]) -> Part | None:
    """Returns the section about the versions up to this one; None for the first version."""
    if not earlier:
        return None
    found = measures([*earlier, results])
    grids, notes = [], []
    for each in found:
        heads = ("Variant", *(version.version for version in (*earlier, results)))
        rows = tuple((name, *(_cell(point) for point in line)) for name, line in each.lines.items())
        sparks = tuple(spark(name, each.heading, line) for name, line in each.lines.items())
        grids.append(Grid(heads, rows, each.heading, sparks=sparks))
        notes += _notes(each)
    marked = f" {BREAK} stands before a number that was not measured like the one before it." if notes else ""
    intro = f"The versions of {results.recipe}, oldest first.{marked}"
    return Part("History", intro, tuple(grids), notes=tuple(notes))


def measures(versions: Sequence[Results]) -> list[Measure]:
    """Returns all measures of all variants that any version has, oldest version first."""
    unit, scale = byte_unit(v.size_bytes for version in versions for v in version.measured)
    tasks = dict.fromkeys(score.task for version in versions for v in version.measured for score in v.accuracy)

    def share(task: str) -> Value:
        return lambda v: None if (score := _score(v, task)) is None else _shown(score)

    wanted: list[tuple[str, str, Value, Why, Callable[[float], str]]] = [
        (
            "Perplexity",
            "",
            lambda v: v.perplexity.value if v.perplexity else None,
            _protocol,
            lambda x: significant(x, 4),
        ),
        *((f"Accuracy {task}", "%", share(task), _task(task), lambda x: fixed(100 * x, 1)) for task in tasks),
        (
            "Size",
            unit,
            lambda v: None if v.size_bytes is None else float(v.size_bytes),
            _source,
            lambda x: significant(x / scale, 3),
        ),
        ("Decode", "tok/s", lambda v: v.decode_tok_s, _speed, lambda x: significant(x, 3)),
    ]
    names = dict.fromkeys(v.name for version in versions for v in version.variants if not v.elsewhere)
    found = []
    for title, measured_in, value, why, text in wanted:
        lines = {name: _line(versions, name, value, why, text) for name in names}
        known = {name: line for name, line in lines.items() if any(point.value is not None for point in line)}
        if known:
            found.append(Measure(title, measured_in, known))
    return found


def read(folders: Iterable[Path]) -> tuple[list[Results], list[str]]:
    """Returns the results in version directories, and a line for each that cannot be read."""
    found, refused = [], []
    for folder in folders:
        try:
            found.append(load(folder))
        except LightenError as error:
            refused.append(f"{folder.name} is left out of the history: {error}")
    return found, refused


def value(found: Sequence[Measure]) -> dict[str, Any]:
    """Returns the measures as JSON, by heading and variant: every version's value, and why it stands apart."""
    return {
        each.heading: {
            name: [{"version": point.version, "value": point.value, "apart": point.why or None} for point in line]
            for name, line in each.lines.items()
        }
        for each in found
    }


def _line(versions: Sequence[Results], name: str, value: Value, why: Why, text: Callable[[float], str]) -> list[Point]:
    line: list[Point] = []
    last: tuple[Results, Variant] | None = None
    for version in versions:
        variant = next((v for v in version.measured if v.name == name), None)
        number = value(variant) if variant else None
        if variant is None or number is None:
            line.append(Point(version.version))
            continue
        reason = (_source(*last, version, variant) or why(*last, version, variant)) if last else ""
        line.append(Point(version.version, number, text(number), reason))
        last = version, variant
    return line


def _cell(point: Point) -> str:
    return f"{BREAK} {point.text}" if point.why else point.text


def _notes(measure: Measure) -> list[str]:
    """Returns a sentence for every reason why numbers of a version stand apart, with the variants it applies to."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, line in measure.lines.items():
        for point in line:
            if point.why:
                found.setdefault((point.version, point.why), []).append(name)
    everyone = len(measure.lines)
    return [
        f"{measure.title} in {version}{'' if len(names) == everyone else ' of ' + ', '.join(names)}: {why}."
        for (version, why), names in found.items()
    ]


def _source(before: Results, _old: Variant, now: Results, _new: Variant) -> str:
    """Returns the sentence that the model is another one, by its identity if both versions have it."""
    ours, theirs = ((each.source.model_extra or {}).get("identity") for each in (before, now))
    same = ours == theirs if None not in (ours, theirs) else before.source.model == now.source.model
    return "" if same else "another source model"


def _perplexity(v: Variant) -> float | None:
    return v.perplexity.value if v.perplexity else None


def _protocol(_before: Results, old: Variant, _now: Results, new: Variant) -> str:
    return other_protocol(old.perplexity, new.perplexity) if old.perplexity and new.perplexity else ""


def _task(task: str) -> Why:
    def why(_before: Results, old: Variant, _now: Results, new: Variant) -> str:
        ours, theirs = _score(old, task), _score(new, task)
        if ours is None or theirs is None:
            return ""
        norm = "" if (ours.acc_norm is None) == (theirs.acc_norm is None) else "another normalisation"
        return other_task(ours, theirs) or norm

    return why


def _speed(before: Results, old: Variant, now: Results, new: Variant) -> str:
    if not same_machine(before.machine, now.machine):
        return "another machine"
    if old.device != new.device or old.runtime != new.runtime:
        return "another device or runtime"
    noise = any(noisy(each.speed[0]) for each in (old, new))
    return other_setting(old.speed[0], new.speed[0]) or ("repeats differ too much to compare" if noise else "")


def _score(v: Variant, task: str) -> Accuracy | None:
    return next((score for score in v.accuracy if score.task == task and _shown(score) is not None), None)


def _shown(score: Accuracy) -> float | None:
    return score.acc if score.acc_norm is None else score.acc_norm
