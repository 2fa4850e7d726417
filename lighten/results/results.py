"""results.json, schema 1: what a run measured, as strict models.

Fractions are fractions (0.01 is one percent), sizes are bytes, times are seconds unless the name says `ms`,
divergences are nats. A section that was not measured is null, or an empty list.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from lighten.results.measured import (
    Accuracy,
    Delta,
    Divergence,
    Energy,
    Free,
    Load,
    Masked,
    Memory,
    Perplexity,
    PerplexityDelta,
    Price,
    Roofline,
    Section,
    SentenceSpeed,
    ServedLoad,
    Similarity,
    Speculative,
    Speed,
    Training,
    Translation,
    Unavailable,
)
from lighten.screen import deep
from lighten.store.names import is_elsewhere, is_name

BASELINE = "baseline"


class Source(Section):
    """The model that everything was made from, and further facts about it (licence, architecture, …)."""

    model_config = ConfigDict(extra="allow")

    model: str
    params: int | None = None


class Variant(Section):
    """One artifact, and everything that was measured on it."""

    name: str
    path: str | None = None
    key: str | None = None
    status: Literal["ok", "failed"]
    error: str | None = None
    format: str | None = None
    runtime: str | None = None
    device: str | None = None
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    params: int | None = None
    training: Training | None = None
    perplexity: Perplexity | None = None
    other_perplexity: list[Perplexity] = Field([])
    """Perplexities by further protocols. They are never compared with the first."""
    vocabulary: str | None = None
    """Difference between its vocabulary and the baseline's, if there is one; its tokens are its own then. Else null."""
    divergence: Divergence | None = None
    accuracy: list[Accuracy] = Field([])
    translation: Translation | None = None
    similarity: Similarity | None = None
    masked: Masked | None = None
    sentences: list[SentenceSpeed] = Field([])
    speed: list[Speed] = Field([])
    load: list[ServedLoad] = Field([])
    speculative: Speculative | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    roofline: Roofline | None = None
    cost: Price | None = None
    delta: Delta | None = None
    loads: list[Load] = Field([])
    unavailable: list[Unavailable] = Field([])
    """What was asked for, and its runtime cannot do."""
    facts: Free = Field({})
    steps: list[Free] = Field([])
    notes: list[str] = Field([])

    @model_validator(mode="after")
    def _is_a_name(self) -> Self:
        """Checks the name, because it becomes the name of a directory."""
        if not (is_name(self.name) or (self.elsewhere and is_elsewhere(self.name))):
            raise ValueError(f"the variant name {self.name!r} may hold letters, digits, '.', '_' and '-' only")
        return self

    @model_validator(mode="after")
    def _failed_says_why(self) -> Self:
        if self.status == "failed" and not (self.error or "").strip():
            raise ValueError(f"variant {self.name!r} failed but its error is empty")
        return self

    @property
    def failed(self) -> bool:
        """True if there is nothing to show except `error`."""
        return self.status == "failed"

    @property
    def perplexities(self) -> list[Perplexity]:
        """Perplexities by all protocols."""
        return [*([self.perplexity] if self.perplexity else []), *self.other_perplexity]

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for a byte of text by the first protocol."""
        found = self.perplexity
        return None if found is None else found.levels.bits_per_byte if found.levels else found.bits_per_byte

    @property
    def elsewhere(self) -> bool:
        """True for a row that another machine measured and that was merged."""
        return "machine" in self.facts

    @property
    def decode_tok_s(self) -> float | None:
        """Decode speed of the first speed measurement."""
        return self.speed[0].decode_tok_s if self.speed else None


class Cost(Section):
    """Cost of a stage."""

    seconds: float | None = None
    peak_bytes: int | None = None
    disk_bytes: int | None = None


class StageCost(Section):
    """One stage: its predicted cost, and its measured cost, which is that of an earlier run if it was cached."""

    name: str
    kind: str
    key: str
    variants: list[str] = Field([])
    cached: bool
    predicted: Cost | None = None
    actual: Cost | None = None


class Overlap(Section):
    """Share of an evaluation set's runs of `ngram` words that stand in the calibration text, with some of them."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    with_: str = Field(alias="with")
    ngram: int
    share: float
    runs: int | None = None
    examples: list[str] = Field([])


class Calibration(Section):
    """The calibration text that was used: `samples` of `asked`, `distinct` tokens of a `vocabulary`."""

    data: str
    asked: int | None = None
    samples: int
    length: int
    tokens: int
    distinct: int | None = None
    vocabulary: int | None = None
    overlap: list[Overlap] = Field([])


class Results(Section):
    """results.json of one version of a recipe."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    recipe: str
    version: str
    created: str
    machine: Free
    source: Source
    variants: list[Variant]
    calibration: Calibration | None = None
    """Null if no variant used the calibration text."""
    stages: list[StageCost] = Field([])
    recipe_yaml: str = ""
    warnings: list[str] = Field([])

    @model_validator(mode="before")
    @classmethod
    def _shown_as_text(cls, value: Any) -> Any:
        """Removes control characters from what other people wrote, because it is printed and put into pages."""
        return deep(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two variants are named {twice[0]!r}")
        return self

    @property
    def title(self) -> str:
        """Recipe and version, such as "quickstart v3"."""
        return f"{self.recipe} {self.version}".strip()

    @property
    def measured(self) -> list[Variant]:
        """Variants that did not fail, baseline included."""
        return [variant for variant in self.variants if not variant.failed]

    @property
    def baseline(self) -> Variant | None:
        """Variant that all variants are compared with; None if it is missing or failed."""
        return next((variant for variant in self.measured if variant.name == BASELINE), None)

    def perplexity_change(self, variant: Variant, protocol: str | None = None) -> PerplexityDelta | None:
        """Returns the paired change by a protocol; by the first protocol if none is named.

        Without a paired change it is the plain change, with no interval. None for other protocols, lengths or texts.
        """
        base = self.baseline
        if base is None or variant is base or variant.vocabulary:
            return None
        ours = next((each for each in variant.perplexities if protocol in (None, each.by)), None)
        first = ours is None or ours is variant.perplexity
        deltas = variant.delta.other_perplexity if variant.delta else []
        paired = variant.delta.perplexity if variant.delta and first else None
        paired = paired if first else next((each for each in deltas if each.protocol == protocol), None)
        if paired:
            return paired
        for theirs in base.perplexities:
            if ours and ours.comparable(theirs):
                absolute = ours.value - theirs.value
                return PerplexityDelta(relative=absolute / theirs.value, absolute=absolute)
        return None

    def size_ratio(self, variant: Variant) -> float | None:
        """Returns the variant's size / the baseline's."""
        base = self.baseline
        if base is None or variant is base:
            return None
        if variant.delta and variant.delta.size_ratio is not None:
            return variant.delta.size_ratio
        return variant.size_bytes / base.size_bytes if variant.size_bytes and base.size_bytes else None
