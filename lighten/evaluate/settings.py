"""What to measure: the `evaluate` section of a recipe."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lighten.data.origin import Text
from lighten.settings import AnyCase

Protocol = Literal["lighten", "gptq", "llama.cpp", "lm-eval"]
Scorer = Literal["lighten", "lm-eval"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
LENGTHS: dict[str, int | None] = {"lighten": 512, "gptq": 2048, "llama.cpp": 512, "lm-eval": None}
"""Tokens of a chunk where none are asked for; None stands for all that the model takes."""

OWN_TASKS = ("builtin", "hellaswag")
Z95 = 1.959964
CLOSE = 0.05
"""Nats between a model and a usual 4-bit variant of it, for which `Perplexity.within` plans."""
CLUSTERED = 2.0
"""How much more the changes of chunks scatter than those of as many tokens that know nothing of each other."""
FEWEST = 8
"""Chunks below which an interval of their changes is not worth much."""


class _Settings(AnyCase, BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """What it is called under `evaluate` in a recipe."""
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
    `within`, in the place of `samples`, asks for as many chunks, spread evenly over the text, as the change of
    perplexity takes to be known within that share of it. The number follows from the settings alone, before anything is
    measured: nothing stops at a lucky moment, and all variants get the same tokens.
    """

    name = "perplexity"
    younger = {"protocol": "lighten", "within": None}

    data: Text = "builtin"
    length: int | None = Field(512, ge=8)
    samples: int | None = Field(None, ge=1)
    within: float | None = Field(None, gt=0, lt=1)
    protocol: Protocol = "lighten"

    @model_validator(mode="before")
    @classmethod
    def _length_of_the_protocol(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("length") is None:
            return {**value, "length": LENGTHS.get(str(value.get("protocol", "lighten")), 512)}
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.within is not None and (self.samples is not None or self.protocol == "lm-eval"):
            why = "lm-eval's takes whole documents" if self.samples is None else "samples says how many chunks already"
            raise ValueError(f"within decides how many chunks are measured, but {why}: leave one of them out")
        return self

    @property
    def most(self) -> int | None:
        """Chunks, or documents, at most; None for all.

        Where logits change a little, the log-likelihood of a token changes with a variance of twice the divergence in
        nats (both are the same form in Fisher's information). So half of the 95 % interval of the mean change over n
        tokens of a variant `CLOSE` to its source is 1.96 √(2 · CLOSE · CLUSTERED / n).
        """
        if self.within is None:
            return self.samples
        assert self.length
        scored = self.length - 1 - (self.length // 2 if self.protocol == "llama.cpp" else 0)
        return max(FEWEST, math.ceil(2 * CLOSE * CLUSTERED * (Z95 / self.within) ** 2 / scored))

    @property
    def told(self) -> str:
        """Perplexity, and the protocol where it is another's."""
        return "perplexity" + ("" if self.protocol == "lighten" else f" by {self.protocol}")

    def tokens(self, context: int | None) -> int:
        """Returns the tokens of a chunk or window, for a model that takes `context` positions."""
        return self.length or context or 2048


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, int | float) else value


class Accuracy(_Settings):
    """Tasks with right answers: a named task, or a `local` file under that name; at most `limit` of its documents.

    Multiple choice in HellaSwag's format is scored here, every other task by lm-eval; `shots` are examples before each
    question, which lm-eval puts there. `within`, in the place of `limit`, asks for as many documents as an accuracy of
    one half, the hardest to know, takes to be known within that much; the number follows from the setting alone.
    """

    name = "accuracy"
    younger = {"scorer": None, "shots": None, "within": None}

    task: str = "builtin"
    local: str | None = None
    limit: int | None = Field(None, ge=1)
    within: float | None = Field(None, gt=0, lt=0.5)
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
        if self.within is not None and (self.limit is not None or self.harness):
            why = "lm-eval counts them: set limit" if self.harness else "limit says how many already"
            raise ValueError(f"within decides how many documents are scored, but {why}, and leave within out")
        return self

    @property
    def most(self) -> int | None:
        """Documents at most, None for all: n with half of Wilson's interval, 1.96 / (2 √(n + 1.96²)), within it."""
        return self.limit if self.within is None else math.ceil((Z95 / (2 * self.within)) ** 2 - Z95**2)

    @property
    def told(self) -> str:
        """Accuracy, and the task where lm-eval has it."""
        return f"accuracy in {Path(self.task).stem}" if self.harness else "accuracy"

    @property
    def task_file(self) -> Path | None:
        """The task's file, where it is one that did not come with lm-eval: lm-eval runs what such a file says."""
        file = Path(self.task).expanduser()
        if not self.harness or file.suffix not in (".yaml", ".yml"):
            return None
        spec = find_spec("lm_eval")
        own = [Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or ()]
        return None if any(file.resolve().is_relative_to(folder) for folder in own) else file

    @property
    def harness(self) -> bool:
        """Whether lm-eval builds the requests and reads the answers."""
        return not (self.local or self.task in OWN_TASKS) if self.scorer is None else self.scorer == "lm-eval"


Sweep = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), BeforeValidator(_one_or_many)]


Attention = Literal["eager", "sdpa", "flash"]
Compile = Annotated[
    Literal["off", "default", "reduce-overhead", "max-autotune"],
    BeforeValidator(lambda value: "off" if value is False else value),  # what YAML makes of a bare off
]
Cache = Literal["dynamic", "static", "quantized"]


class Options(_Settings):
    """How transformers runs a model; what another runtime serves has no such choice.

    `attention` None is transformers' own choice; `compile` is torch.compile's mode, of the step of one token; `cache`
    holds keys and values: growing, of one size, or in 4 bits.
    """

    attention: Attention | None = None
    compile: Compile = "off"
    cache: Cache = "dynamic"

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        if self.compile != "off" and self.cache == "quantized":
            raise ValueError("a quantized cache cannot be compiled: set `compile: off`, or another cache")
        return self


class Override(_Settings):
    """Options of some variants, in the place of everyone's; None keeps those."""

    attention: Attention | None = None
    compile: Compile | None = None
    cache: Cache | None = None


class Speed(Options):
    """Prefill of `prompt` tokens and greedy decoding of `generate` tokens, for every prompt length and batch size.

    Repeated `repeats` times, and up to twice as often until the median decode speed is known within `error`. `options`
    maps names of variants, or patterns such as `gptq-*`, to options of their own; a later entry wins.
    """

    name = "speed"
    younger = {"attention": None, "compile": "off", "cache": "dynamic", "options": {}}

    prompt: Sweep = [128]
    generate: int = Field(64, ge=2)
    batch: Sweep = [1]
    repeats: int = Field(6, ge=2)
    error: float = Field(0.025, gt=0, lt=1)
    options: dict[str, Override] = {}

    def of(self, variant: str) -> Speed:
        """Returns the settings as they are for one variant.

        Raises:
            ValidationError: its options do not go together.
        """
        told = self.model_dump(exclude={"options"})
        for pattern, override in self.options.items():
            if fnmatchcase(variant, pattern):
                told |= override.model_dump(exclude_none=True)
        return Speed.model_validate(told)

    @property
    def plain(self) -> Speed:
        """The settings for what transformers does not run."""
        return Speed.model_validate(self.model_dump(exclude={"options", "attention", "compile", "cache"}))


class Speculative(_Settings):
    """Greedy decoding of `generate` tokens by the variant `target`; `draft`, another one, proposes `tokens` at once.

    After `samples` pieces of `data`, of `prompt` tokens each. `dtype` is the arithmetic of what transformers runs; None
    is what it is served in.
    """

    name = "speculative"

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
        """Returns the settings without the names: the stage has the two as parents."""
        return self.model_dump(mode="json", exclude={"draft", "target"})


Rates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), BeforeValidator(_one_or_many)]


class Load(_Settings):
    """Requests that arrive at random, `rate` a second on average, at the server of the runtime.

    Each has `prompt` tokens of `data` and asks for `generate` more. transformers, which brings no server, decodes those
    that wait together, at most `batch`.
    """

    name = "load"

    rate: Rates = [0.5, 1.0, 2.0]
    requests: int = Field(16, ge=1)
    prompt: int = Field(128, ge=1)
    generate: int = Field(64, ge=2)
    batch: int = Field(8, ge=1)
    data: Text = "builtin"
    seed: int = 0


class Loaders(_Settings):
    """Opening the artifact with every loader that has business with its format; there is nothing to set."""

    name = "loaders"


class Evaluate(_Settings):
    """What to measure; nothing by default, then only the size is known."""

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


Measure = Literal["perplexity", "accuracy", "speed", "load", "speculative", "loaders"]


Settings = Perplexity | Accuracy | Speed | Load | Speculative | Loaders


MEASUREMENTS: dict[str, type[Settings]] = {
    each.name: each for each in (Perplexity, Accuracy, Speed, Load, Speculative, Loaders)
}
"""Settings of each measurement, by its name."""


TIMED: tuple[Measure, ...] = ("speed", "load", "speculative")
"""What depends on the machine, and on what else it does."""
