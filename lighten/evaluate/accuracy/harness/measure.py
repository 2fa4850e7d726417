"""A task of lm-eval's measured on a runtime."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import numpy as np
from lm_eval import evaluator
from numpy.typing import NDArray

from lighten.errors import RequestError
from lighten.evaluate.accuracy.harness import tasks
from lighten.evaluate.accuracy.harness.adapter import RuntimeLM
from lighten.evaluate.accuracy.harness.chat import Chat
from lighten.evaluate.accuracy.scoring import Z95, Measured, wilson
from lighten.evaluate.accuracy.tasks import Tasks
from lighten.evaluate.runtimes.runtime import Runtime, Tokenizer
from lighten.evaluate.stored_result import AccuracyResult
from lighten.results import measured as results
from lighten.step import Report

DROPPED = "the chat template takes no system text: the description of the task {} was left out, as lm-eval does it"
CHECKED = 200
"""Number of texts on which the model's own tokenizer is compared with the used one."""


def measure(
    runtime: Runtime, tokenizer: Tokenizer, settings: Tasks, report: Report, chat: Chat | None = None
) -> Measured:
    """Measures a model on a task, tokenized by `tokenizer` whatever the model's own is.

    Values are `score` and, where the task has it, `score_norm` of each document: 1 if it was answered rightly. A group
    of tasks is one list of documents. `chat` is the model's chat template if the settings ask for chats.

    Raises:
        RequestError: lm-eval cannot do this task on a language model that runs here.
        Failure: the model is broken, or takes fewer positions than one answer has.
    """
    report(0, 1, "building requests")
    loaded = tasks.load(settings)
    model = RuntimeLM(runtime, tokenizer, report, chat)
    try:
        found = evaluator.evaluate(
            lm=model,
            task_dict=loaded,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            system_instruction=settings.system,
        )
    except ValueError as error:  # tasks that run written code, or show pictures
        raise RequestError(f"the task {settings.task} cannot be measured here: {error}") from error
    name = tasks.name_of(loaded, settings)
    samples = [each for _, some in sorted(found["samples"].items()) for each in _first_filter(some)]
    measured = {key: column for key in ("acc", "acc_norm") if (column := _column(samples, key)) is not None}
    metric = next(iter(measured), None)
    if metric is None and samples:  # such as exact_match
        metric = next((key for key in samples[0]["metrics"] if _column(samples, key) is not None), None)
    columns = {"": None if metric is None else _column(samples, metric), "_norm": measured.get("acc_norm")}
    values: dict[str, NDArray[Any]] = {}
    shares: dict[str, Any] = {}
    for suffix, column in columns.items():
        if column is not None:
            shares |= {f"acc{suffix}": float(column.mean()), f"ci95{suffix}": interval(column)}
            values[f"score{suffix}"] = column
    accuracy = results.Accuracy(
        task=name,
        **{"acc": None, "acc_norm": None, "ci95": None, "ci95_norm": None, **shares},
        n=len(samples),
        scorer="lm-eval",
        version=version("lm_eval"),
        metric=metric,
        metrics=_metrics(found, name),
        truncated=model.truncated,
    )
    if settings.chat:
        accuracy = accuracy.model_copy(update={"chat": True, "system": settings.system})
    texts = ["".join(part for part in each["arguments"][0] if isinstance(part, str)) for each in samples[:CHECKED]]
    match = all(runtime.encode(text) == tokenizer.encode(text) for text in texts)
    result = AccuracyResult(accuracy=accuracy, tokenizer_match=match)
    if chat and chat.dropped:
        result = result.having(warnings=[DROPPED.format(name)])
    return Measured(result, values or {"score": np.empty(0)})


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the documents in order. If there are several ways to read an answer, it takes the task's first."""
    return sorted((each for each in samples if each["filter"] == samples[0]["filter"]), key=lambda each: each["doc_id"])


def _column(samples: list[dict[str, Any]], metric: str) -> NDArray[Any] | None:
    """Returns a metric of every document, if all have it and it is a share of the maximum."""
    found = [each.get(metric) for each in samples]
    numbers = [float(each) for each in found if isinstance(each, bool | int | float | np.number)]
    return np.array(numbers) if len(numbers) == len(found) and all(0 <= each <= 1 for each in numbers) else None


def _metrics(found: dict[str, Any], name: str) -> list[results.Metric]:
    """Returns the numbers that lm-eval itself reports, for the task or group and for the tasks in it."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if not way or metric.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            better = found["higher_is_better"].get(task, {}).get(metric)
            rows.append(results.Metric(task=task, metric=metric, filter=way, value=value, higher_is_better=better))
    return sorted(rows, key=lambda row: row.task != name)


def interval(scores: NDArray[Any]) -> tuple[float, float]:
    """Returns the 95 % interval of a mean: Wilson's if every score is 0 or 1, else the normal one."""
    if np.isin(scores, (0, 1)).all():
        return wilson(int(scores.sum()), len(scores))
    half = Z95 * float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 1.0
    return max(float(scores.mean()) - half, 0.0), min(float(scores.mean()) + half, 1.0)
