"""What to measure: the `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Perplexity(_Settings):
    """Perplexity of a text, in chunks of `length` tokens; at most `samples` chunks."""

    data: str = "builtin"
    length: int = Field(512, ge=8)
    samples: int | None = Field(None, ge=1)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class Accuracy(_Settings):
    """Multiple choice: a named task, or a `local` .jsonl file under that name; at most `limit` tasks."""

    task: str = "builtin"
    local: str | None = None
    limit: int | None = Field(None, ge=1)


Sweep = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), BeforeValidator(_one_or_many)]


class Speed(_Settings):
    """Prefill of `prompt` tokens and greedy decoding of `generate` tokens, for every prompt length and batch size.

    Repeated `repeats` times, and up to twice as often until the median decode speed is known within `error`.
    """

    prompt: Sweep = [128]
    generate: int = Field(64, ge=2)
    batch: Sweep = [1]
    repeats: int = Field(6, ge=2)
    error: float = Field(0.025, gt=0, lt=1)


class Loaders(_Settings):
    """Opening the artifact with every loader that has business with its format; there is nothing to set."""


class Evaluate(_Settings):
    """What to measure; nothing by default, then only the size is known."""

    perplexity: Perplexity | None = None
    accuracy: list[Accuracy] = []
    speed: Speed | None = None
    loaders: bool = False

    @field_validator("accuracy", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value
