"""Multiple-choice accuracy, scored as lm-eval scores HellaSwag."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.data.choices import Choice, load_choices
from lighten.errors import Failure
from lighten.evaluate.accuracy.tasks import Tasks
from lighten.evaluate.runtimes.runtime import Question, Runtime, Score, Tokenizer
from lighten.evaluate.stored_result import AccuracyResult
from lighten.results import measured
from lighten.step import Report

Z95 = 1.959964


@dataclass(frozen=True)
class Measured:
    """The results of an accuracy measurement: its aggregates, and the scores and choices of every task."""

    result: AccuracyResult
    values: dict[str, NDArray[Any]]
    """`logprobs [tasks, endings]` (NaN where a task has fewer endings), `choice`, `choice_norm`, `label` `[tasks]`."""


def ask(choice: Choice, tokenizer: Tokenizer) -> Question:
    """Returns the ids of a task.

    Context, a space and ending are tokenized together and split where the context's own ids end, as in lm-eval. White
    space at the end of the context goes to the ending. If a token crosses the border (it does not with tokenizers that
    split at spaces), the border moves before it, so that all endings share one context.
    """
    context = choice.context.rstrip()
    space = choice.context[len(context) :] + " "
    wholes = [tokenizer.encode(context + space + ending) for ending in choice.endings]
    columns = list(zip(tokenizer.encode(context), *wholes, strict=False))
    size = next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), len(columns))
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    endings = [whole[size:] for whole in wholes]
    shared = start + wholes[0][:size]
    if not shared or not all(endings):
        raise Failure(
            f"the task {choice.context[:60]!r} leaves no tokens to score: it needs a context, and endings with text"
        )
    return Question(shared, endings)


def choose(scores: Sequence[Sequence[Score]], tasks: Sequence[Choice]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns the ending chosen for each task: by log-probability, and by log-probability per character."""
    plain, normalized = [], []
    for task, found in zip(tasks, scores, strict=True):
        logprobs = np.array([score.logprob for score in found])
        plain.append(logprobs.argmax())
        normalized.append((logprobs / [max(len(ending), 1) for ending in task.endings]).argmax())
    return np.array(plain, dtype=np.int32), np.array(normalized, dtype=np.int32)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927, without continuity correction)."""
    share = right / n
    spread = Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def measure(runtime: Runtime, tokenizer: Tokenizer, settings: Tasks, report: Report) -> Measured:
    """Measures a model on a set of tasks, tokenized by `tokenizer`, whatever the model's own tokenizer is."""
    tasks = load_choices(settings.local or settings.task, settings.most)
    report(0, len(tasks), "tokenizing")
    scores = runtime.choose_many([ask(task, tokenizer) for task in tasks], report)
    logprobs = np.full((len(tasks), max(len(task.endings) for task in tasks)), np.nan)
    for row, found in zip(logprobs, scores, strict=True):
        row[: len(found)] = [score.logprob for score in found]
    width = np.array([len(task.endings) for task in tasks])
    if not np.isfinite(logprobs[np.arange(logprobs.shape[1]) < width[:, None]]).all():
        raise Failure("the model gives logits that are not finite numbers: it is broken, or its arithmetic overflows")
    label = np.array([task.label for task in tasks], dtype=np.int32)
    choice, choice_norm = choose(scores, tasks)
    right, right_norm = int((choice == label).sum()), int((choice_norm == label).sum())
    accuracy = measured.Accuracy(
        task=settings.task,
        acc=right / len(tasks),
        acc_norm=right_norm / len(tasks),
        n=len(tasks),
        ci95=wilson(right, len(tasks)),
        ci95_norm=wilson(right_norm, len(tasks)),
        scorer="lighten",
    )
    text = "\n".join(f"{task.context} {ending}" for task in tasks for ending in task.endings)
    match = runtime.encode(text) == tokenizer.encode(text)
    values = {"logprobs": logprobs, "choice": choice, "choice_norm": choice_norm, "label": label}
    return Measured(AccuracyResult(accuracy=accuracy, tokenizer_match=match), values)
