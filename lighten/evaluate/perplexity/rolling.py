"""Log-likelihood of whole documents in windows, as in lm-eval's `loglikelihood_rolling`.

Every token is predicted once. The first window begins with the token that stands for an empty context. Each later
window begins with as many earlier tokens as the model takes in addition to the predicted ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lighten.evaluate.runtimes.runtime import Question, Runtime
from lighten.step import Report


def windows(ids: list[int], prefix: int, length: int) -> Iterator[Question]:
    """Yields the windows of a document, of at most `length` tokens each (without the last predicted token).

    Args:
        ids: tokens to predict.
        prefix: token before the first one.
        length: maximum number of tokens that the model gets at once.
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        before = ids[max(end - length - 1, 0) : start] if start else [prefix]
        yield Question(before, [ids[start:end]])


def loglikelihoods(
    runtime: Runtime, documents: Sequence[list[int]], prefix: int, length: int, report: Report
) -> list[float]:
    """Returns the log-likelihood (nats) of each document. Windows of several documents are computed together.

    Args:
        runtime: the model.
        documents: token ids of each.
        prefix: token before the first one.
        length: maximum number of tokens that the model gets at once.
        report: progress, in windows.
    """
    questions: list[Question] = []
    owners: list[int] = []
    for number, ids in enumerate(documents):
        found = list(windows(ids, prefix, length))
        questions += found
        owners += [number] * len(found)
    totals = [0.0] * len(documents)
    for number, scores in zip(owners, runtime.choose_many(questions, report), strict=True):
        totals[number] += scores[0].logprob
    return totals
