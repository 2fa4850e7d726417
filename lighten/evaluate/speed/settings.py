"""Speed of a model on this machine: settings, checks, prediction and columns of a row."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lighten.errors import RequestError
from lighten.evaluate.measurement import FIXED_BYTES, READ_PER_SECOND, Measurement, linear_flops
from lighten.evaluate.speed.change import change
from lighten.facts import ModelFacts
from lighten.settings import AnyCase
from lighten.step import Estimate


def one_or_many(value: Any) -> Any:
    """Returns a single number as a list; a list unchanged."""
    return [value] if isinstance(value, int | float) else value


def check_room(name: str, prompt: int, generate: int, context: int | None, model: str) -> None:
    """Raises RequestError if a prompt with its continuation is longer than the model's context."""
    if context and prompt + generate > context:
        raise RequestError(
            f"{name}: {prompt} prompt and {generate} generated tokens are more than the {context} positions "
            f"that {model} takes: set a smaller `prompt` or `generate`"
        )


Counts = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), BeforeValidator(one_or_many)]
Attention = Literal["eager", "sdpa", "flash"]
Compile = Annotated[
    Literal["off", "default", "reduce-overhead", "max-autotune"],
    BeforeValidator(lambda value: "off" if value is False else value),  # what YAML makes of a bare off
]
Cache = Literal["dynamic", "static", "quantized"]


class Options(AnyCase, BaseModel):
    """How transformers runs a model. Other runtimes have no such choice.

    `attention` None is transformers' own choice. `compile` is torch.compile's mode, for the step of one token. `cache`
    holds keys and values: growing, of one size, or in 4 bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Attention | None = None
    compile: Compile = "off"
    cache: Cache = "dynamic"

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        if self.compile != "off" and self.cache == "quantized":
            raise ValueError("a quantized cache cannot be compiled: set `compile: off`, or another cache")
        return self


class Override(AnyCase, BaseModel):
    """Options of some variants instead of the common ones; None keeps the common ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Attention | None = None
    compile: Compile | None = None
    cache: Cache | None = None


class Speed(Options, Measurement):
    """Prefill of `prompt` tokens and greedy decoding of `generate` tokens, for every prompt length and batch size.

    It is repeated `repeats` times, and up to twice as often until the median decode speed is known within `error`.
    `options` maps names of variants, or patterns such as `gptq-*`, to options of their own; a later entry wins.
    """

    name = "speed"
    work = "lighten.evaluate.speed.work:measure"
    needs = frozenset({"decodes"})
    over_http = True
    timed = True
    younger: ClassVar[dict[str, Any]] = {"attention": None, "compile": "off", "cache": "dynamic", "options": {}}

    prompt: Counts = [128]
    generate: int = Field(64, ge=2)
    batch: Counts = [1]
    repeats: int = Field(6, ge=2)
    error: float = Field(0.025, gt=0, lt=1)
    options: dict[str, Override] = {}

    def of(self, variant: str) -> Speed:
        """Returns the settings of one variant.

        Raises:
            ValidationError: its options do not go together.
        """
        given = self.model_dump(exclude={"options"})
        for pattern, override in self.options.items():
            if fnmatchcase(variant, pattern):
                given |= override.model_dump(exclude_none=True)
        return Speed.model_validate(given)

    @property
    def plain(self) -> Speed:
        """Settings for other runtimes than transformers."""
        return Speed.model_validate(self.model_dump(exclude={"options", "attention", "compile", "cache"}))

    def longest(self, context: int | None) -> int:
        """Returns the tokens of the longest prompt with its continuation."""
        return max(self.prompt) + self.generate

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if the longest prompt with its continuation is longer than the model's context."""
        check_room(self.name, max(self.prompt), self.generate, facts.context, model)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of every repeat: products for the prompt, and weights read for each token after it."""
        repeats = self.repeats + 2
        read = len(self.batch) * len(self.prompt) * repeats * self.generate * 2.0 * facts.params
        return Estimate(
            fast_flops=sum(self.batch) * sum(self.prompt) * repeats * linear_flops(facts),
            seconds=6 + read / READ_PER_SECOND,
            peak_bytes=FIXED_BYTES + 3 * facts.params,
            disk_bytes=10_000,
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts speeds, memory and energy into a row."""
        row |= {name: result[name] for name in ("speed", "memory", "energy")}

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Puts the ratio of decode speeds into a row."""
        row.setdefault("delta", {}).update(change(measured, baseline))
