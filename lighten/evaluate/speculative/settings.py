"""Decoding with a draft: settings, checks, prediction and columns of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lighten.data import text
from lighten.data.origin import Text
from lighten.evaluate.measurement import FIXED_BYTES, READ_PER_SECOND, Measurement
from lighten.evaluate.speed.settings import check_room
from lighten.facts import ModelFacts
from lighten.model.tokens import check_text
from lighten.step import Estimate


class Speculative(Measurement):
    """Greedy decoding of `generate` tokens by the variant `target`; the variant `draft` proposes `tokens` at once.

    It follows `samples` pieces of `data`, of `prompt` tokens each. `dtype` is the arithmetic of transformers; None is
    the arithmetic that a model is served in.
    """

    name = "speculative"
    work = "lighten.evaluate.speculative.work:measure"
    needs = frozenset({"rewinds"})
    timed = True

    draft: str
    target: str = "baseline"
    tokens: int = Field(5, ge=1)
    prompt: int = Field(64, ge=1)
    generate: int = Field(64, ge=2)
    samples: int = Field(6, ge=1)
    data: Text = "builtin"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _two_of_them(self) -> Self:
        if self.draft == self.target:
            raise ValueError(f"{self.draft} cannot be its own draft: name another variant")
        return self

    def key_config(self) -> dict[str, Any]:
        """Returns the settings without the names, because the two are parents of the stage."""
        return self.model_dump(mode="json", exclude={"draft", "target"})

    @property
    def pair(self) -> tuple[str, str]:
        """Target and draft."""
        return self.target, self.draft

    def data_digest(self) -> str:
        """Returns the SHA-256 of the text."""
        return text.identity(self.data, "perplexity")

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if a prompt with its continuation is longer than the model's context."""
        check_room(self.name, self.prompt, self.generate, facts.context, model)

    def check_text(self, model: Path) -> None:
        """Raises RequestError or Failure for a text that cannot be read, or is shorter than a prompt."""
        check_text(model, self.data, "perplexity", self.prompt)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of writing every text by the target, by both, and by the draft alone."""
        read = 3 * self.samples * self.generate * 2.0 * facts.params
        seconds = 8 + read / READ_PER_SECOND
        return Estimate(seconds=seconds, peak_bytes=FIXED_BYTES + 5 * facts.params, disk_bytes=10_000)

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the gain by the draft into the row of the target."""
        row["speculative"] = {**result["speculative"], "draft": self.draft}
