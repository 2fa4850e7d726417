"""Writing text on any runtime: the choice of each next token, and where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten.evaluate.runtimes.runtime import Floats, Runtime, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """The choice of a token: the likeliest at temperature 0, else at random among `top_k` and the mass `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Floats, rng: np.random.Generator) -> int:
        """Returns a token for logits `[vocab]`."""
        if self.temperature <= 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        order = order[: self.top_k] if self.top_k else order
        scaled = logits[order].astype(np.float64) / self.temperature
        chances = np.exp(scaled - scaled[0])
        chances /= chances.sum()
        kept = np.cumsum(chances) - chances < self.top_p
        return int(rng.choice(order[kept], p=chances[kept] / chances[kept].sum()))


def write(
    runtime: Runtime,
    tokenizer: Tokenizer,
    prompt: list[int],
    most: int,
    stops: Sequence[str],
    sampling: Sampling,
    rng: np.random.Generator,
) -> str:
    """Returns what a model writes after a prompt, up to the first of `stops`, the end of text or `most` tokens."""
    written: list[int] = []
    text = ""
    decoding = runtime.decode(prompt, most)
    logits: Any = next(decoding, None)
    while logits is not None:
        token = sampling.choose(logits, rng)
        if token == tokenizer.eos:
            break
        written.append(token)
        text = tokenizer.decode(written)
        if any(stop and stop in text for stop in stops):
            break
        try:
            logits = decoding.send(token)
        except StopIteration:
            break
    decoding.close()
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
