"""The paired change of accuracy, task by task, so that luck that both share cancels out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.evaluate.paired import Z95, read, values

if TYPE_CHECKING:
    from numpy.typing import NDArray


def change(measured: Path, baseline: Path) -> dict[str, Any]:
    """Returns `{task, acc, acc_ci95, acc_norm, acc_norm_ci95, gained, lost}` from the baseline's to another.

    Raises:
        RequestError: the two were not scored alike on the same tasks.
        Failure: a measurement cannot be read.
    """
    ours, theirs = (read(each)["accuracy"] for each in (measured, baseline))
    scorers = [each.get("scorer", "lighten") for each in (ours, theirs)]
    if scorers[0] != scorers[1]:
        raise RequestError(f"{measured} was scored by {scorers[0]} and {baseline} by {scorers[1]}: score both by one")
    asked = [(each.get("chat", False), each.get("system")) for each in (ours, theirs)]
    if asked[0] != asked[1]:
        raise RequestError(
            f"{measured} and {baseline} were asked in different ways (`chat`, `system`): ask both in one"
        )
    return {"task": ours["task"], **by_task(values(measured), values(baseline))}


def by_task(measured: dict[str, NDArray[Any]], base: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Returns the changes in accuracy with 95 % intervals from the paired tasks.

    `gained` and `lost` count the tasks that only the variant, and only the baseline, answers rightly (acc_norm).
    """
    found: dict[str, Any] = {}
    scores, before = _scores(measured), _scores(base)
    labels = [each.get("label") for each in (measured, base)]
    same = labels[0] is None or labels[1] is None or labels[0].tolist() == labels[1].tolist()
    if not same or {name: len(score) for name, score in scores.items()} != {
        name: len(score) for name, score in before.items()
    }:
        raise RequestError("the two were measured on different tasks and cannot be compared")
    change = next(iter(scores.values()), None)
    if change is None or not len(change):
        return {"acc": None, "acc_norm": None, "gained": None, "lost": None}
    for name, score in scores.items():
        change = score - before[name]
        half = Z95 * float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        middle = float(change.mean())
        found[name] = middle
        found[f"{name}_ci95"] = None if math.isnan(half) else [middle - half, middle + half]
    return {**found, "gained": int((change > 0).sum()), "lost": int((change < 0).sum())}


def _scores(found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Returns the score of every task by `acc` and `acc_norm`: 1 for a right answer."""
    if "label" in found:
        pairs = {"acc": "choice", "acc_norm": "choice_norm"}
        return {name: (found[choice] == found["label"]).astype("float64") for name, choice in pairs.items()}
    pairs = {"acc": "score", "acc_norm": "score_norm"}
    return {name: found[score] for name, score in pairs.items() if score in found}
