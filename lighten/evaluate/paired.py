"""What changed against the baseline, position by position and task by task, so that luck common to both cancels out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lighten.errors import Failure, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESULT = "result.json"
VALUES = "values.safetensors"
Z95 = 1.959964


def compare(kind: Literal["perplexity", "accuracy", "speed"], variant: Path, baseline: Path) -> dict[str, Any]:
    """Returns the change from the baseline's measurement to the variant's.

    Returns:
        For perplexity `{"perplexity": {relative, ci95, absolute}}`; for accuracy `{task, acc, acc_ci95, acc_norm,
        acc_norm_ci95, gained, lost}`; for speed `{"decode_speed_ratio": …}` at the first batch and lengths both have.

    Raises:
        RequestError: the two were not measured on the same text or tasks.
        Failure: a measurement cannot be read.
    """
    result, base = read(variant), read(baseline)
    if kind == "speed":
        return {"decode_speed_ratio": speed(result["speed"], base["speed"])}
    if kind == "accuracy":
        scorers = [each["accuracy"].get("scorer", "lighten") for each in (result, base)]
        if scorers[0] != scorers[1]:
            raise RequestError(
                f"{variant} was scored by {scorers[0]} and {baseline} by {scorers[1]}: score both by one"
            )
        return {"task": result["accuracy"]["task"], **accuracy(values(variant), values(baseline))}
    ours, theirs = (each["perplexity"]["protocol"] for each in (result, base))
    names = [each.get("name", "lighten") for each in (ours, theirs)]
    if names[0] != names[1]:
        raise RequestError(
            f"{variant} was measured by the protocol {names[0]} and {baseline} by {names[1]}: such perplexities cannot "
            "be compared; measure both by one protocol"
        )
    if ours["ids_sha256"] != theirs["ids_sha256"] or ours.get("length") != theirs.get("length"):
        raise RequestError(f"{variant} and {baseline} were measured on different tokens and cannot be compared")
    measured, before = values(variant), values(baseline)
    if "words" in measured:
        return {"perplexity": by_word(measured["nll"], before["nll"], measured["words"])}
    return {"perplexity": perplexity(measured["nll"], before["nll"])}


def perplexity(nll: NDArray[np.floating[Any]], base: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Returns the relative change of perplexity, its 95 % interval, and the absolute change.

    The interval is Student's, of the mean over chunks of the difference in mean log-likelihood; None for fewer
    than three chunks.

    Args:
        nll: negative log-likelihoods of the variant `[chunks, positions]`.
        base: those of the baseline.
    """
    means, base_means = nll.astype("float64").mean(axis=1), base.astype("float64").mean(axis=1)
    change = means - base_means
    middle = float(change.mean())
    interval = None
    if len(change) >= 3:
        half = student95(len(change) - 1) * float(change.std(ddof=1)) / math.sqrt(len(change))
        interval = [math.expm1(middle - half), math.expm1(middle + half)]
    absolute = math.exp(means.mean()) - math.exp(base_means.mean())
    return {"relative": math.expm1(middle), "ci95": interval, "absolute": absolute}


def by_word(
    nll: NDArray[np.floating[Any]], base: NDArray[np.floating[Any]], words: NDArray[np.integer[Any]]
) -> dict[str, Any]:
    """Returns the same for perplexity by word; the interval is Student's, of a ratio of sums over documents.

    Args:
        nll: negative log-likelihood of each document by the variant `[documents]`.
        base: the same by the baseline.
        words: words of each document.
    """
    total, n = float(words.sum()), len(nll)
    change = nll - base
    middle = float(change.sum()) / total
    interval = None
    if n >= 3:
        half = student95(n - 1) * math.sqrt(float(((change - middle * words) ** 2).sum()) * n / (n - 1)) / total
        interval = [math.expm1(middle - half), math.expm1(middle + half)]
    absolute = math.exp(float(nll.sum()) / total) - math.exp(float(base.sum()) / total)
    return {"relative": math.expm1(middle), "ci95": interval, "absolute": absolute}


def accuracy(values: dict[str, NDArray[Any]], base: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Returns the changes in accuracy with 95 % intervals from the paired tasks.

    `gained` and `lost` count the tasks that only the variant, and only the baseline, answers rightly (acc_norm).
    """
    found: dict[str, Any] = {}
    scores, before = _scores(values), _scores(base)
    labels = [each.get("label") for each in (values, base)]
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


def _scores(values: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Returns the score of every task by `acc` and `acc_norm`: 1 for a right answer."""
    if "label" in values:
        pairs = {"acc": "choice", "acc_norm": "choice_norm"}
        return {name: (values[choice] == values["label"]).astype("float64") for name, choice in pairs.items()}
    pairs = {"acc": "score", "acc_norm": "score_norm"}
    return {name: values[score] for name, score in pairs.items() if score in values}


def speed(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> float | None:
    """Returns the ratio of decode speeds at the first batch and lengths that both have, or None if there are none."""
    by_shape = {_shape(row): row["decode_tok_s"] for row in reversed(base)}
    common = [row for row in rows if _shape(row) in by_shape]
    return common[0]["decode_tok_s"] / by_shape[_shape(common[0])] if common else None


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("batch", "prompt", "generate"))


def student95(freedom: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t, within 1 % from 3 degrees of freedom, 3 % at 2.

    Expansion in 1 / freedom of Abramowitz and Stegun, 26.7.5.
    """
    z, v = Z95, freedom
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    return z + first + second + third + fourth


def read(measurement: Path) -> dict[str, Any]:
    """Returns the aggregates of a measurement."""
    try:
        result: dict[str, Any] = json.loads((measurement / RESULT).read_text(encoding="utf-8"))
        return result
    except (OSError, ValueError) as error:
        raise Failure(f"{measurement} is not a measurement: cannot read its {RESULT} ({error})") from error


def values(measurement: Path) -> dict[str, NDArray[Any]]:
    """Returns the values of every position or task of a measurement."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, NDArray[Any]] = load_file(measurement / VALUES)
        return found
    except (OSError, SafetensorError) as error:
        raise Failure(f"{measurement / VALUES} cannot be read: {error}") from error
