"""Writing of an answer by a sequence-to-sequence model: how it begins and ends, and the likeliest one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lighten.errors import Failure
from lighten.model.files import read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rules:
    """How an answer begins and ends."""

    start: int
    ends: tuple[int, ...]
    first: int | None = None
    """Token that every answer begins with, such as that of its language."""
    banned: tuple[int, ...] = ()
    """Tokens that are never written, such as padding."""

    @staticmethod
    def of(folder: Path) -> Rules:
        """Returns the rules of the model in a directory, by its generation_config.json and config.json.

        Raises:
            Failure: neither says how an answer begins or ends.
        """
        files = [folder / name for name in ("generation_config.json", "config.json")]
        told: dict[str, Any] = {}
        for file in reversed(files):
            told |= read_json(file) if file.is_file() else {}
        start, end = told.get("decoder_start_token_id"), told.get("eos_token_id")
        start = told.get("pad_token_id") if start is None else start
        ends = tuple(end) if isinstance(end, list) else () if end is None else (end,)
        if not isinstance(start, int) or not ends:
            raise Failure(f"{folder}: its config names no decoder_start_token_id or no eos_token_id: add them")
        banned = tuple(each[0] for each in told.get("bad_words_ids") or () if len(each) == 1)
        return Rules(start, ends, told.get("forced_bos_token_id"), banned)


def greedy(step: Callable[[NDArray[np.int64]], NDArray[Any]], count: int, rules: Rules, most: int) -> list[list[int]]:
    """Returns the likeliest answers, token by token.

    Args:
        step: takes the next id of each answer, `[count, 1]`, and returns the logits after it, `[count, vocab]`.
        count: number of answers.
        rules: how they begin and end.
        most: number of tokens of an answer at most.
    """
    ids = np.full((count, 1), rules.start, dtype=np.int64)
    found: list[list[int]] = [[] for _ in range(count)]
    going = np.ones(count, dtype=bool)
    for place in range(most):
        logits = np.array(step(ids), dtype=np.float32)
        logits[:, list(rules.banned)] = -np.inf
        chosen = logits.argmax(-1)
        if place == 0 and rules.first is not None:
            chosen[:] = rules.first
        going &= ~np.isin(chosen, rules.ends)
        if not going.any():
            break
        for row in np.flatnonzero(going):
            found[row].append(int(chosen[row]))
        ids = chosen[:, None].astype(np.int64)
    return found


def translated(model: Any, inputs: dict[str, torch.Tensor], rules: Rules, most: int) -> list[list[int]]:
    """Returns the answers of a model of transformers, greedily and with a cache.

    Args:
        model: a sequence-to-sequence model in evaluation mode.
        inputs: `input_ids` and `attention_mask`, both `[texts, longest]`, on its device.
        rules: how answers begin and end.
        most: number of tokens of an answer at most.
    """
    import torch

    with torch.inference_mode():
        encoded = model.get_encoder()(**inputs)
        cache: list[Any] = [None]

        def step(ids: NDArray[np.int64]) -> NDArray[Any]:
            fed = torch.from_numpy(ids)
            found = model(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=fed.to(inputs["input_ids"].device),
                past_key_values=cache[0],
                use_cache=True,
            )
            cache[0] = found.past_key_values
            logits: NDArray[Any] = found.logits[:, -1].float().cpu().numpy()
            return logits

        return greedy(step, len(inputs["input_ids"]), rules, most)
