"""Questions in batches: similar lengths together, and the context of a question only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.evaluate.runtimes import rows
from lighten.evaluate.runtimes.runtime import Ids, Question, Score


def by_length(
    questions: Sequence[Question], tokens: int, *, padded: bool, sequences: int | None = None
) -> list[list[int]]:
    """Returns the indices of the questions in batches, longest first, so that a lack of memory shows at once.

    Args:
        questions: what to batch.
        tokens: most tokens in a batch; a question longer than that is a batch of its own.
        padded: whether every question of a batch takes the room of the longest.
        sequences: most endings in a batch.
    """
    batches: list[list[int]] = []
    room = endings = 0
    for index in sorted(range(len(questions)), key=lambda index: -questions[index].packed):
        question = questions[index]
        room -= questions[batches[-1][0]].packed if padded and batches else question.packed
        endings += len(question.endings)
        if not batches or room < 0 or (sequences is not None and endings > sequences):
            batches.append([])
            room, endings = tokens - question.packed, len(question.endings)
        batches[-1].append(index)
    return batches


def longest_first(prompts: Sequence[list[int]], most: Sequence[int]) -> list[int]:
    """Returns the numbers of the prompts behind which anything is to be written, the longest prompt first."""
    return sorted((number for number in range(len(prompts)) if most[number] > 0), key=lambda each: -len(prompts[each]))


def to_write(
    prompts: Sequence[list[int]], most: Sequence[int], *, together: int, room: Callable[[int], int]
) -> list[list[int]]:
    """Returns the numbers of the prompts in batches, longest first. All texts of a batch take the room of the longest.

    Args:
        prompts: ids of each prompt.
        most: tokens to write behind each prompt, at most.
        together: most tokens of the prompts of a batch; a prompt longer than that is a batch of its own.
        room: function that returns how many texts of a length, written tokens included, there is room for.
    """
    batches: list[list[int]] = []
    for number in longest_first(prompts, most):
        batch = [*(batches[-1] if batches else ()), number]
        width, rest = len(prompts[batch[0]]), max(most[each] for each in batch)
        if batches and len(batch) * width <= together and len(batch) <= room(width + rest):
            batches[-1] = batch
        else:
            batches.append([number])
    return batches


class Layout:
    """A question as one row of tokens: its context, then every ending without its last token, which predicts nothing.

    Attributes: ids: token ids `[n]`. positions: position of each token in its text `[n]`; every ending starts where the
    context ends. segments: 0 for the context, 1, 2, ... for the endings `[n]`. wanted: places of the tokens whose
    logits are needed. picks: for every ending, which of the `wanted` predict its tokens. targets: ids of all endings,
    one after the other.
    """

    def __init__(self, question: Question) -> None:
        size = len(question.context)
        rests = [len(ending) - 1 for ending in question.endings]
        self.ids = np.array(question.context + [token for ending in question.endings for token in ending[:-1]])
        self.positions = np.concatenate([np.arange(size), *(size + np.arange(rest) for rest in rests)])
        self.segments = np.repeat(np.arange(len(rests) + 1), [size, *rests])
        self.wanted = np.arange(size - 1, len(self.ids))
        firsts = 1 + np.cumsum([0, *rests])
        self.picks = [np.array([0, *range(first, first + rest)]) for first, rest in zip(firsts, rests, strict=False)]
        self.targets = np.concatenate([np.array(ending) for ending in question.endings])


class Row:
    """The layouts of a batch one after the other, as one row of tokens.

    Attributes:
        ids: token ids `[n]`.
        positions: position of each token in its text `[n]`.
        sees: whether a token (row) attends to another (column), `[n, n]`: its context's, its ending's and its own.
        wanted: places of the tokens whose logits are needed, layout by layout.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        sizes = [len(layout.ids) for layout in layouts]
        starts = np.cumsum([0, *sizes])
        self.ids = np.concatenate([layout.ids for layout in layouts])
        self.positions = np.concatenate([layout.positions for layout in layouts])
        self.wanted = np.concatenate([start + each.wanted for start, each in zip(starts, layouts, strict=False)])
        self.sees = np.zeros((len(self.ids), len(self.ids)), dtype=np.bool_)
        for start, size, layout in zip(starts, sizes, layouts, strict=False):
            block = slice(start, start + size)
            self.sees[block, block] = attended(layout.segments)


def attended(segments: Ids) -> NDArray[np.bool_]:
    """Returns which tokens see which, `[..., n, n]`, from their segments `[..., n]`. All later tokens see 0."""
    same = segments[..., None, :] == segments[..., :, None]
    seen: NDArray[np.bool_] = (same | (segments[..., None, :] == 0)) & np.tri(segments.shape[-1], dtype=np.bool_)
    return seen


def read_scores(
    logits: Any, layouts: Sequence[Layout], token_logprobs: Callable[..., Any] = rows.token_logprobs
) -> list[list[Score]]:
    """Returns the scores of the endings from the logits at all wanted places, `[rows, vocab]`.

    `token_logprobs` reads them: the function of `rows` for numpy's logits, that of `device_rows` for logits on a
    device.
    """
    starts = np.cumsum([0, *(len(layout.wanted) for layout in layouts)])
    at = np.concatenate([start + pick for start, layout in zip(starts, layouts, strict=False) for pick in layout.picks])
    logprobs, greedy = token_logprobs(logits, np.concatenate([layout.targets for layout in layouts]), at)
    scores: list[list[Score]] = []
    done = 0
    for layout in layouts:
        scores.append([])
        for pick in layout.picks:
            span = slice(done, done + len(pick))
            scores[-1].append(Score(float(logprobs[span].sum()), bool(greedy[span].all())))
            done += len(pick)
    return scores
