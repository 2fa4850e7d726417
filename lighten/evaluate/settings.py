"""What to measure: the `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.load.settings import Load
from lighten.evaluate.loaders.settings import Loaders
from lighten.evaluate.measurement import Measurement
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.speculative.settings import Speculative
from lighten.evaluate.speed.settings import Speed
from lighten.settings import AnyCase


class Evaluate(AnyCase, BaseModel):
    """What to measure; nothing by default, then only the size is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perplexity: list[Perplexity] = []
    accuracy: list[Accuracy] = []
    speed: Speed | None = None
    load: Load | None = None
    speculative: Speculative | None = None
    loaders: bool = False
    roofline: bool = False
    price_per_hour: float | None = Field(default=None, gt=0)
    currency: str = Field(default="USD", min_length=1, max_length=8)

    @model_validator(mode="after")
    def _speed_is_measured(self) -> Evaluate:
        asked = "roofline" if self.roofline else "price_per_hour" if self.price_per_hour is not None else None
        if asked and self.speed is None:
            raise ValueError(f"{asked} is reckoned from measured speeds: add `speed: {{}}`")
        return self

    @field_validator("perplexity", "accuracy", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, dict | BaseModel) else value

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        asked: dict[str, list[str]] = {
            "task": [each.task for each in self.accuracy],
            "protocol": [each.protocol for each in self.perplexity],
        }
        for what, names in asked.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"the {what} {twice[0]} is asked for twice: results are kept under its name")
        return self

    @property
    def asked(self) -> list[Measurement]:
        """Every measurement that is asked for, those of quality first."""
        found = [*self.perplexity, *self.accuracy, self.speed, self.load, Loaders() if self.loaders else None]
        return [each for each in (*found, self.speculative) if each is not None]
