"""The columns of accuracy, one for each task."""

from __future__ import annotations

from typing import Literal

from lighten.report.cell import Cell, Column, plain
from lighten.report.numbers import decimals_for, fixed
from lighten.results.measured import Accuracy
from lighten.results.results import Results, Variant


def accuracy_columns(results: Results) -> list[Column]:
    """Returns a column for each task: acc_norm if any variant has it, else acc."""
    scores = [score for variant in results.measured for score in variant.accuracy]
    tasks = list(dict.fromkeys(score.task for score in scores))
    found = []
    for i, task in enumerate(tasks):
        same = [score for score in scores if score.task == task]
        norm = any(score.acc_norm is not None for score in same)
        if not norm and all(score.acc is None for score in same):
            found.append(_reported(f"metric-{i}", task, same))
            continue
        metric = next((score.metric for score in same if score.metric), None) or "acc"
        name = "acc_norm" if norm else metric
        how = ", each ending's likelihood divided by its length" if norm else ""
        by = ", ".join(dict.fromkeys(f" (scored by {score.scorer}{in_chat(score)})" for score in same if score.scorer))
        cut = ", ".join(
            f" of {variant.name}, {score.truncated:,} requests were cut from the left to fit its context"
            for variant in results.measured
            for score in variant.accuracy
            if score.task == task and score.truncated
        )
        found.append(
            Column(
                f"{name}-{i}",
                name if len(tasks) == 1 else f"{name} {task}",
                "%",
                "higher",
                5,
                f"Right answers in the task {task}{how}{by}, ± half the 95 % interval; Δ is the paired change in points"
                f"{';' if cut else ''}{cut}.",
                lambda v, task=task, norm=norm: _accuracy(v, task, norm),  # type: ignore[misc]
            )
        )
    if tasks:
        return found
    return [Column("acc_norm", "acc_norm", "%", "higher", 5, "Right answers.", lambda v: Cell())]


def _reported(column: str, task: str, scores: list[Accuracy]) -> Column:
    """Returns the column of a task that has no share of right answers: the first number that lm-eval reports."""
    first = next((score.metrics[0] for score in scores if score.metrics), None)
    metric = first.metric if first else ""
    direction: Literal["higher", "lower", ""] = ""
    if first and first.higher_is_better is not None:
        direction = "higher" if first.higher_is_better else "lower"

    def cell(v: Variant) -> Cell:
        numbers = [each for score in v.accuracy if score.task == task for each in score.metrics]
        value = next((each.value for each in numbers if each.metric == metric), None)
        return plain(value, 4)

    about = f"{metric} of the task {task}, as lm-eval reports it."
    return Column(column, f"{metric} {task}".strip(), "", direction, 5, about, cell)


def _accuracy(v: Variant, task: str, norm: bool) -> Cell:
    score = next((score for score in v.accuracy if score.task == task), None)
    value = _score(score, norm)
    if score is None or value is None:
        return Cell()
    interval = score.ci95_norm if norm else score.ci95
    half = 50 * (interval[1] - interval[0]) if interval else None
    decimals = 1 if half is None else decimals_for(half, most=2)
    parts = [] if half is None else [f"± {fixed(half, decimals)}"]
    deltas = v.delta.accuracy if v.delta else []
    delta = next((delta for delta in deltas if delta.task == task), None)
    moved = None if delta is None else delta.acc_norm if norm else delta.acc
    if moved is not None:
        parts.append(f"Δ {fixed(100 * moved, max(1, decimals), sign=True)}")
    margin = 0.0 if half is None else half / 100
    return Cell(fixed(100 * value, decimals), (", ".join(parts),) if parts else (), value, margin)


def in_chat(score: Accuracy) -> str:
    """Returns the words for tasks that were asked in chats; none for others."""
    return f", asked in chats{'' if score.system is None else ' with a system text'}" if score.chat else ""


def _score(score: Accuracy | None, norm: bool) -> float | None:
    return None if score is None else score.acc_norm if norm else score.acc
