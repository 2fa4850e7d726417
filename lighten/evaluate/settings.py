"""What to measure: the `evaluate` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Protocol = Literal["lighten", "gptq", "llama.cpp", "lm-eval"]
Scorer = Literal["lighten", "lm-eval"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
LENGTHS: dict[str, int | None] = {"lighten": 512, "gptq": 2048, "llama.cpp": 512, "lm-eval": None}
"""Tokens of a chunk where none are asked for; None stands for all that the model takes."""

OWN_TASKS = ("builtin", "hellaswag")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    younger: ClassVar[dict[str, Any]] = {}
    """Settings that came after results were kept under the others, and the values that mean what was done before."""

    @property
    def told(self) -> str:
        """What is measured, in a word or two."""
        return type(self).__name__.lower()

    def key_config(self) -> dict[str, Any]:
        """Returns the settings as they enter a stage's key; without the younger ones where nothing is asked of them."""
        found = self.model_dump(mode="json")
        return {name: value for name, value in found.items() if name not in self.younger or value != self.younger[name]}


class Perplexity(_Settings):
    """Perplexity of a text by a named protocol.

    In chunks of `length` tokens, at most `samples` of them; by lm-eval's, in windows over at most `samples` documents.
    """

    younger = {"protocol": "lighten"}

    data: str = "builtin"
    length: int | None = Field(512, ge=8)
    samples: int | None = Field(None, ge=1)
    protocol: Protocol = "lighten"

    @model_validator(mode="before")
    @classmethod
    def _length_of_the_protocol(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("length") is None:
            return {**value, "length": LENGTHS.get(str(value.get("protocol", "lighten")), 512)}
        return value

    @property
    def told(self) -> str:
        """Perplexity, and the protocol where it is another's."""
        return "perplexity" + ("" if self.protocol == "lighten" else f" by {self.protocol}")

    def tokens(self, context: int | None) -> int:
        """Returns the tokens of a chunk or window, for a model that takes `context` positions."""
        return self.length or context or 2048


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class Accuracy(_Settings):
    """Tasks with right answers: a named task, or a `local` file under that name; at most `limit` of its documents.

    Multiple choice in HellaSwag's format is scored here, every other task by lm-eval; `shots` are examples before each
    question, which lm-eval puts there.
    """

    younger = {"scorer": None, "shots": None}

    task: str = "builtin"
    local: str | None = None
    limit: int | None = Field(None, ge=1)
    scorer: Scorer | None = None
    shots: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _own_scorer_knows_it(self) -> Accuracy:
        if self.scorer == "lighten" and not (self.local or self.task in OWN_TASKS):
            raise ValueError(f"lighten's own scorer knows {', '.join(OWN_TASKS)} and `local` files, not {self.task!r}")
        if self.scorer == "lm-eval" and self.task == "builtin":
            raise ValueError("the built-in tasks are none of lm-eval's: name one of its tasks, or a task's .yaml file")
        if self.shots and not self.harness:
            raise ValueError("shots are put before the question by lm-eval: add `scorer: lm-eval`")
        return self

    @property
    def told(self) -> str:
        """Accuracy, and the task where lm-eval has it."""
        return f"accuracy in {Path(self.task).stem}" if self.harness else "accuracy"

    @property
    def harness(self) -> bool:
        """Whether lm-eval builds the requests and reads the answers."""
        return not (self.local or self.task in OWN_TASKS) if self.scorer is None else self.scorer == "lm-eval"


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

    perplexity: list[Perplexity] = []
    accuracy: list[Accuracy] = []
    speed: Speed | None = None
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

    @field_validator("accuracy")
    @classmethod
    def _one_of_each_name(cls, value: list[Accuracy]) -> list[Accuracy]:
        names = [each.task for each in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the task {twice[0]} is asked for twice: results are kept under its name")
        return value

    @field_validator("perplexity")
    @classmethod
    def _one_of_each(cls, value: list[Perplexity]) -> list[Perplexity]:
        names = [each.protocol for each in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the protocol {twice[0]} is asked for twice: one text and length for each protocol")
        return value
