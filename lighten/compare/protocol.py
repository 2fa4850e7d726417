"""Whether two sides were measured alike. Otherwise a comparison would compare the protocols."""

from __future__ import annotations

from typing import Any

from lighten.compare.side import Side
from lighten.errors import RequestError
from lighten.report import alike
from lighten.results.measured import Accuracy


def check(a: Side, b: Side) -> None:
    """Checks that two sides were measured alike.

    Raises:
        RequestError: they were not; the message names what differs.
    """
    found = [*_perplexity(a, b), *_tasks(a, b)]
    if found:
        raise RequestError(
            f"{a.text} and {b.text} were not measured alike and cannot be compared: {'; '.join(found)}. "
            "Measure both by one recipe, or compare their files, which measures both in the same way"
        )


def same_machine(a: Side, b: Side) -> bool:
    """Returns whether the speeds of two sides can be compared."""
    return a.row.device == b.row.device and alike.same_machine(a.machine, b.machine)


def _perplexity(a: Side, b: Side) -> list[str]:
    if not (a.row.perplexity and b.row.perplexity):
        return []
    ours, theirs = a.row.perplexity.protocol, b.row.perplexity.protocol
    lines = [f"perplexity: {_differs(key, ours, theirs)}" for key in alike.differing(ours, theirs)]
    both_torch = a.row.runtime == b.row.runtime == "torch"
    if both_torch and ours.get("dtype") != theirs.get("dtype"):
        lines.append(f"perplexity: arithmetic is {ours.get('dtype')} in A and {theirs.get('dtype')} in B")
    return lines


def _differs(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if key == "data_sha256" and ours.get("data") != theirs.get("data"):
        return f"text is {ours.get('data')} in A and {theirs.get('data')} in B"
    if key.endswith("sha256"):
        return f"another {alike.WORDS.get(key, key)}"
    return f"{alike.WORDS.get(key, key)} is {_short(ours.get(key))} in A and {_short(theirs.get(key))} in B"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _asked(score: Accuracy) -> str:
    """Returns in words how a model was asked."""
    if not score.chat:
        return "as plain text"
    return "in chats" if score.system is None else f"in chats with the system text {_short(score.system)!r}"


def _tasks(a: Side, b: Side) -> list[str]:
    ours, theirs = ({each.task: each for each in side.row.accuracy} for side in (a, b))
    if ours and theirs and not ours.keys() & theirs.keys():
        return [f"tasks are {', '.join(ours)} in A and {', '.join(theirs)} in B"]
    lines = []
    for task in [task for task in ours if task in theirs]:
        asked = [_asked(each[task]) for each in (ours, theirs)]
        if asked[0] != asked[1]:
            lines.append(f"{task} is asked {asked[0]} in A and {asked[1]} in B")
        elif ours[task].n != theirs[task].n:
            lines.append(f"{task} has {ours[task].n} tasks in A and {theirs[task].n} in B")
        elif task in a.accuracy and task in b.accuracy:
            digests = [side.accuracy[task].manifest["config"].get("data") for side in (a, b)]
            if digests[0] != digests[1]:
                lines.append(f"{task} has different tasks")
    return lines
