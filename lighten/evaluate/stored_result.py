"""What a measurement leaves in the store: the contents of its `result.json`.

These are sections of results.json (`lighten.results`), and how they were measured.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field

from lighten.results.measured import (
    Accuracy,
    Divergence,
    Energy,
    Masked,
    Memory,
    Perplexity,
    Section,
    SentenceSpeed,
    ServedLoad,
    Speculative,
    Speed,
    Translation,
)


class Result(Section):
    """The common part of all results: what ran the model, and remarks for the person."""

    warnings: list[str] = Field(default_factory=list)
    vocabulary: str | None = None
    """Difference of the model's vocabulary from the baseline's; None if there is none."""
    tokenizer_match: bool | None = None
    """Whether the model's own tokenizer reads the data like the used one."""
    unavailable: str | None = None
    """Reason why the runtime of the model cannot do the measurement; None if it can."""
    runtime: str | None = None
    device: str | None = None
    detail: str | None = None
    """Versions and kernels of the runtime."""
    dtype: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)

    def having(self, **fields: Any) -> Self:
        """Returns the result with further fields."""
        return self.model_copy(update=fields)

    def contents(self) -> dict[str, Any]:
        """Returns the fields that were set, as JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


class PerplexityResult(Result):
    """Perplexity, and the divergence from the baseline if there is a reference."""

    perplexity: Perplexity
    divergence: Divergence | None


class AccuracyResult(Result):
    """Accuracy in one set of tasks."""

    accuracy: Accuracy


class SpeedResult(Result):
    """A row for each shape; memory of the whole process, and energy of a token."""

    speed: list[Speed]
    memory: Memory
    energy: Energy


class TranslationResult(Result):
    """How near translations come to references."""

    translation: Translation


class MaskedResult(Result):
    """Share of hidden tokens that are found."""

    masked: Masked


class SentencesResult(Result):
    """A row for each size of a batch; memory of the whole process."""

    sentences: list[SentenceSpeed]
    memory: Memory


class LoadResult(Result):
    """A row for each rate of requests."""

    load: list[ServedLoad]


class SpeculativeResult(Result):
    """The gain by a draft model."""

    speculative: Speculative
