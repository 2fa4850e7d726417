"""What to measure: the `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Perplexity(_Settings):
    """Perplexity of a text, in chunks of `length` tokens; at most `samples` chunks."""

    data: str = "builtin"
    length: int = Field(512, ge=8)
    samples: int | None = Field(None, ge=1)


class Accuracy(_Settings):
    """Multiple choice: a named task, or a `local` .jsonl file under that name; at most `limit` tasks."""

    task: str = "builtin"
    local: str | None = None
    limit: int | None = Field(None, ge=1)


class Speed(_Settings):
    """Prefill of `prompt` tokens and greedy decoding of `generate` tokens, at every batch size."""

    prompt: int = Field(128, ge=1)
    generate: int = Field(64, ge=2)
    batch: list[int] = Field([1], min_length=1)
    repeats: int = Field(5, ge=2)


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
