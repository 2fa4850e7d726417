"""Requests that keep arriving: settings, checks, prediction and columns of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from lighten.data import text
from lighten.data.origin import Text
from lighten.evaluate.measurement import FIXED_BYTES, READ_PER_SECOND, Measurement
from lighten.evaluate.speed.settings import check_room, one_or_many
from lighten.facts import ModelFacts
from lighten.model.tokens import check_text
from lighten.step import Estimate

Rates = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(one_or_many)]
Users = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(one_or_many)]
MARGIN = 32
"""Number of tokens that a server may count more than lighten: special tokens, or another cut."""


class Load(Measurement):
    """Requests that arrive at random, `rate` a second on average, at the server of the runtime.

    Each has `prompt` tokens of `data` and asks for `generate` more tokens. transformers brings no server: it decodes
    waiting requests together, at most `batch`. `concurrency` are numbers of users besides: each user sends the next
    request when the last one is answered.
    """

    name = "load"
    work = "lighten.evaluate.load.arrivals:measure"
    needs = frozenset({"decodes"})
    over_http = True
    timed = True
    younger: ClassVar[dict[str, Any]] = {"concurrency": []}

    rate: Rates = Field([0.5, 1.0, 2.0])
    requests: int = Field(16, ge=1)
    prompt: int = Field(128, ge=1)
    generate: int = Field(64, ge=2)
    batch: int = Field(8, ge=1)
    data: Text = "builtin"
    seed: int = 0
    concurrency: Users = Field([])

    @model_validator(mode="after")
    def _something_arrives(self) -> Self:
        if not self.rate and not self.concurrency:
            raise ValueError("load needs a rate of requests, or a concurrency: give one of them")
        return self

    def data_digest(self) -> str:
        """Returns the SHA-256 of the text."""
        return text.identity(self.data, "perplexity")

    def longest(self, context: int | None) -> int:
        """Returns the tokens of a prompt with its continuation, and what a server may count more."""
        return self.prompt + self.generate + MARGIN

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if a prompt with its continuation is longer than the model's context."""
        check_room(self.name, self.prompt, self.generate, facts.context, model)

    def check_text(self, model: Path) -> None:
        """Raises RequestError or Failure for a text that cannot be read, or is shorter than a prompt."""
        check_text(model, self.data, "perplexity", self.prompt)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the larger of two costs: waiting for the requests, and serving them."""
        rows = len(self.rate) + len(self.concurrency)
        read = rows * self.requests * self.generate * 2.0 * facts.params / READ_PER_SECOND
        waits = sum(self.requests / rate for rate in self.rate)
        return Estimate(seconds=10 + max(read, waits), peak_bytes=FIXED_BYTES + 3 * facts.params, disk_bytes=10_000)

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the result of every rate and concurrency into a row."""
        row["load"] = result["load"]
