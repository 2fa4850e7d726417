"""The paired change of perplexity, position by position, so that luck that both share cancels out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.evaluate.paired import read, student95, values

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def change(measured: Path, baseline: Path) -> dict[str, Any]:
    """Returns `{relative, ci95, absolute}` from the baseline's measurement to another.

    Raises:
        RequestError: the two were not measured by one protocol on the same tokens.
        Failure: a measurement cannot be read.
    """
    ours, theirs = (read(each)["perplexity"]["protocol"] for each in (measured, baseline))
    names = [each.get("name", "lighten") for each in (ours, theirs)]
    if names[0] != names[1]:
        raise RequestError(
            f"{measured} was measured by the protocol {names[0]} and {baseline} by {names[1]}: such perplexities "
            "cannot be compared; measure both by one protocol"
        )
    if ours["ids_sha256"] != theirs["ids_sha256"] or ours.get("length") != theirs.get("length"):
        raise RequestError(f"{measured} and {baseline} were measured on different tokens and cannot be compared")
    now, before = values(measured), values(baseline)
    if "words" in now:
        return by_word(now["nll"], before["nll"], now["words"])
    return by_chunk(now["nll"], before["nll"])


def by_chunk(nll: NDArray[np.floating[Any]], base: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Returns the relative change of perplexity, its 95 % interval, and the absolute change.

    The interval is Student's, for the mean over chunks of the difference in mean log-likelihood. It is None for fewer
    than three chunks.

    Args:
        nll: negative log-likelihoods of the variant `[chunks, positions]`.
        base: negative log-likelihoods of the baseline.
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
    """Returns the change of perplexity by word. The interval is Student's, for a ratio of sums over documents.

    Args:
        nll: negative log-likelihood of each document by the variant `[documents]`.
        base: negative log-likelihood of each document by the baseline.
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
