"""The amount of pruning: a pattern of zeros, or the size of the model that is left."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.settings import Settings

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Returns N and M of "N:M": N of every M neighbouring inputs keep their weight.

    Raises:
        ValueError: the text is no such pattern.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError("a pattern is N:M with 0 < N < M, such as 2:4: N of every M neighbouring weights are kept")
    return int(found[1]), int(found[2])


def parse_count(text: str) -> int:
    """Returns a number of weights: "100M", "1.1B", "5000".

    Raises:
        ValueError: the text is no number.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError("a number of weights is such as 100M, 1.1B or 5000000")
    return round(float(found[1]) * _UNITS[found[2].upper()])


class Target(Settings):
    """A target: one of the two settings. As text it is "ratio=0.2", "params=100M" or "100M"."""

    bare: ClassVar[str | None] = "params"
    example: ClassVar[str] = "ratio=0.2, or params=100M"

    ratio: float | None = Field(None, gt=0, lt=1, description="share of all weights that goes")
    params: Annotated[int, BeforeValidator(lambda n: parse_count(n) if isinstance(n, str) else n)] | None = Field(
        None, gt=0, description="weights that may be left, such as 100M"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.ratio is None) == (self.params is None):
            raise ValueError("a target is one of the two: ratio, or params")
        return self

    def most(self, facts: ModelFacts) -> int:
        """Returns the maximum number of weights that may be left."""
        return self.params if self.params else int(facts.params * (1 - (self.ratio or 0.0)))

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if nothing has to go, or the embedding alone is too large."""
        most = self.most(facts)
        if most >= facts.params:
            raise RequestError(f"the model has {facts.params:,} weights already: ask for fewer than that")
        if most <= facts.embedding_params:
            raise RequestError(
                f"the embedding alone has {facts.embedding_params:,} weights of {facts.params:,}, and it stays: "
                f"{most:,} cannot be reached; distil into a smaller student instead"
            )
