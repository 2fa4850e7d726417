"""Texts that a model is asked to write, and the choice of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEED = 1234
"""Seed of what is drawn at random, together with the number of the request."""


@dataclass(frozen=True)
class Sampling:
    """The choice of a token: the likeliest at temperature 0, else at random among `top_k` and the mass `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
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


@dataclass(frozen=True)
class Wanted:
    """A text to write: ids before it (at least one), its most tokens, the texts that end it, and how it is chosen."""

    prompt: list[int]
    most: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling()

    def cut(self, text: str) -> str:
        """Returns a text up to the first of the texts that end it."""
        ends = [text.find(stop) for stop in self.stops if stop and stop in text]
        return text[: min(ends)] if ends else text
