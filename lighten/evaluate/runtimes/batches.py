"""Putting questions of similar length into batches."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.evaluate.runtimes import Question


def by_length(questions: Sequence[Question], tokens: int, *, padded: bool, sequences: int | None = None) -> list[list[int]]:
    """Returns the indices of the questions in batches, longest first, so that a lack of memory shows at once.

    Args:
        questions: what to batch.
        tokens: most tokens in a batch; a question longer than that is a batch of its own.
        padded: whether every question of a batch takes the room of the longest.
        sequences: most endings in a batch.
    """
    order = sorted(range(len(questions)), key=lambda index: -questions[index].packed)
    batches: list[list[int]] = []
    room = endings = 0
    for index in order:
        question = questions[index]
        need = questions[batches[-1][0]].packed if padded and batches else question.packed
        endings += len(question.endings)
        room -= need
        if not batches or room < 0 or (sequences is not None and endings > sequences):
            batches.append([])
            room = tokens - question.packed
            endings = len(question.endings)
        batches[-1].append(index)
    return batches
