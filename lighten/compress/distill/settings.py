"""Settings of the `distill` step, in which a student learns from its teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lighten.compress.distill.pair_teacher import PairTeacher
from lighten.compress.distill.teacher import Teacher
from lighten.compress.prune.amounts import parse_pattern
from lighten.data import pairs, text
from lighten.data.origin import Data
from lighten.errors import RequestError
from lighten.facts import TITLES, ModelFacts, Task
from lighten.settings import Settings
from lighten.step import Estimate, Step

BACKWARD = 3
"""Products of a forward and a backward pass, in forward passes."""


class Grid(Settings):
    """The grid to train through. A following `rtn` step with the same settings finds the weights on it."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 128
    sym: bool = True


class Movement(Settings):
    """The share of weights that movement pruning removes while the student learns."""

    sparsity: float | None = Field(None, gt=0, lt=1)
    pattern: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("movement needs one of the two: sparsity or pattern")
        if self.pattern:
            parse_pattern(self.pattern)
        return self


class Shape(Settings):
    """The shape of a new student: its differences from the model that the step is given."""

    layers: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1)
    intermediate: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)


def _student(value: Any) -> Any:
    return Shape.model_validate(value) if isinstance(value, str) and "=" in value else value


class Distill(Step):
    """Training on a teacher's distributions, its hidden states, or the text that it writes."""

    kind: ClassVar[str] = "distill"
    work: ClassVar[str] = "lighten.compress.distill.step:run"
    version: ClassVar[int] = 1
    calibrated: ClassVar[bool] = False
    tasks: ClassVar[tuple[Task, ...]] = ("causal", "seq2seq", "masked", "embedding")

    teacher: str = Field("source", description="the source of the recipe, or another model of the same vocabulary")
    student: Annotated[Shape | str | None, BeforeValidator(_student)] = Field(
        None, description="instead of the model that the step is given: another one, or a shape to make anew"
    )
    data: Data = Field(
        "builtin",
        description="text to train on: builtin, a file (.txt, .md, .jsonl, .json, .csv, .parquet), a hub set; for a "
        "model that translates: phrases, or pairs:FILE with the fields source and target",
    )
    samples: int | None = Field(None, ge=2, description="sequences of that text at most")
    length: int = Field(256, ge=8, description="tokens of a sequence")
    level: Literal["token", "sequence"] = Field(
        "token", description="learn the teacher's distributions, or only the text that it writes"
    )
    written: int | None = Field(None, ge=1, description="sequences that the teacher writes besides (sequence: 64)")
    temperature: float = Field(1.0, gt=0, le=20, description="T of the distributions that are compared")
    alpha: float = Field(0.9, ge=0, le=1, description="share of the divergence in the loss; the rest is the next token")
    beta: float = Field(0.0, ge=0, description="weight of the distance of hidden states; the teacher runs along then")
    top_k: int = Field(
        64, ge=0, description="tokens of the teacher's distribution that are written down; 0: it runs along instead"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the sequences")
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    batch: int = Field(8, ge=1, description="sequences of a step")
    accumulate: int = Field(1, ge=1, description="parts that a batch is cut into to save memory")
    lr: float = Field(2e-4, gt=0, description="largest learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.95, gt=0, lt=1, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic of the products; auto: bf16 where the processor has it"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    lora: int | None = Field(None, ge=1, description="train LoRA matrices of this rank instead of all weights")
    quantize: Grid | None = Field(None, description="train through a grid: {bits: 4, group_size: 64}")
    movement: Movement | None = Field(None, description="prune by movement meanwhile: {sparsity: 0.5}")
    validation: float = Field(0.05, ge=0, le=0.5, description="share of the text that is held out")
    validate_every: int | None = Field(None, ge=1, description="steps between looks at it (default: a tenth of all)")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be cut into {self.accumulate} equal parts")
        if self.lora and (self.quantize or self.movement):
            raise ValueError("lora leaves the weights alone: with quantize or movement train them all")
        if self.lora and isinstance(self.student, Shape):
            raise ValueError("a student made anew has nothing for lora to build on: train all its weights")
        return self

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key: the text by its content. The teacher is a parent."""
        value = self.model_dump(mode="json", exclude={"teacher", "save_every"})
        if isinstance(self.student, str):
            del value["student"]  # a parent too
        return {
            **value,
            "data": text.identity(self.data, "calibration", text.wanted_letters(self.samples, self.length)),
        }

    def lessons(self) -> Step:
        """Returns the stage that runs the teacher."""
        if pairs.is_pairs(self.data):
            written = self.level == "sequence"
            count = self.written if written and self.written else self.samples
            return PairTeacher(data=str(self.data), samples=count, most=self.length, writes_targets=written)
        return self._teacher()

    def _teacher(self) -> Teacher:
        live = self.beta > 0 or self.level == "sequence" or self.alpha == 0
        return Teacher.model_validate(
            {
                "data": self.data,
                "samples": self.samples,
                "length": self.length,
                "written": self.written or (64 if self.level == "sequence" else 0),
                "top_k": 0 if live else self.top_k,
                "validation": self.validation,
                "temperature": 1.0 if live or not self.top_k else self.temperature,
                "seed": self.seed,
            }
        )

    @property
    def runs_along(self) -> bool:
        """Whether the teacher runs again in every step."""
        return self.beta > 0 or (self.level == "token" and self.alpha > 0 and not self.top_k)

    def changes(self, facts: ModelFacts) -> dict[str, Any]:
        """Returns the keys of config.json that a new student changes, for a model of such sizes."""
        if not isinstance(self.student, Shape):
            return {}
        names = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "intermediate": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
        }
        given = self.student.model_dump(exclude_none=True)
        changes = {key: given[name] for name, key in names.items() if name in given}
        if "heads" in given or "hidden" in given:
            changes["head_dim"] = self.result(facts).head_dim
        return changes

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if a group or a pattern does not divide a width, or a shape or a text is impossible."""
        self._check_task(facts)
        after = self.result(facts)
        if after.hidden % after.heads or after.heads % after.kv_heads:
            raise RequestError(
                f"a student of {after.hidden} channels, {after.heads} heads and {after.kv_heads} key/value heads "
                "cannot be: each number must divide the one before"
            )
        widths = {"hidden": after.hidden, "attention": after.heads * after.head_dim, "MLP": after.intermediate}
        for name, width in widths.items():
            if self.quantize and self.quantize.group_size != -1 and width % self.quantize.group_size:
                raise RequestError(f"group_size {self.quantize.group_size} does not divide the {name} width {width}")
            if self.movement and self.movement.pattern and width % parse_pattern(self.movement.pattern)[1]:
                raise RequestError(f"the pattern {self.movement.pattern} does not divide the {name} width {width}")

    def _check_task(self, facts: ModelFacts) -> None:
        """Raises RequestError if the data or a setting is not for models of such a task."""
        if (facts.task == "seq2seq") != pairs.is_pairs(self.data):
            needs = "pairs of texts: data: phrases, or pairs:FILE" if facts.task == "seq2seq" else "a text, not pairs"
            raise RequestError(f"{facts.architecture} is {TITLES[facts.task]}, which learns from {needs}")
        if facts.task == "causal":
            return
        given = [name for name in ("lora", "quantize", "movement") if getattr(self, name)]
        if facts.task != "seq2seq":
            given += [name for name, asked in (("level", self.level != "token"), ("written", self.written)) if asked]
            if facts.task == "embedding" and not (self.alpha or self.beta):
                raise RequestError("alpha and beta are both 0: there is nothing to learn from the teacher")
        if isinstance(self.student, Shape):
            given += [f"student {name}" for name in self.student.model_dump(exclude_none=True) if name != "layers"]
        if given:
            raise RequestError(f"{given[0]} is for causal language models, {facts.architecture} is none: leave it out")

    def result(self, facts: ModelFacts) -> ModelFacts:
        """Returns the sizes of the student."""
        if not isinstance(self.student, Shape):
            return facts
        given = self.student.model_dump(exclude_none=True)
        after = replace(facts, **given)
        return replace(after, head_dim=after.hidden // after.heads) if {"heads", "hidden"} & set(given) else after

    def requires(self) -> list[tuple[str, str]]:
        """Packages beyond the core."""
        return [("peft", "lora")] if self.lora else []

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses everything except plain weights."""
        if form != "hf":
            raise RequestError(f"this model is {form}: distil the one that it was made from")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns forward and backward passes over every token of every step."""
        if pairs.is_pairs(self.data):
            return self._predict_pairs(facts)
        there = (
            text.count_letters(self.data, "calibration", text.wanted_letters(self.samples, self.length))
            // 4
            // self.length
        )
        sequences = min(self.samples or there, there) + self._teacher().written
        steps = self.steps or max(1, round(self.epochs * sequences / self.batch))
        tokens = steps * self.batch * self.length
        after = self.result(facts)
        flops = 2.0 * (after.layers * after.layer_linear_params + after.vocab * after.hidden)
        states = (
            self.batch // self.accumulate * self.length * after.layers * (14 * after.hidden + 4 * after.intermediate)
        )
        return Estimate(
            fast_flops=BACKWARD * flops * tokens * (4 / 3 if self.gradient_checkpointing else 1),
            seconds=steps * 30.0 * after.params / 10e9,
            peak_bytes=int(700_000_000 + 16 * after.params + 2 * states + 12 * 512 * after.vocab),
            disk_bytes=2 * after.params,
        )

    def _predict_pairs(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of steps on pairs, of about 20 tokens each."""
        count = self.samples or pairs.MOST["train"]
        steps = self.steps or max(1, round(self.epochs * count / self.batch))
        flops = 2.0 * facts.params * steps * self.batch * 20
        return Estimate(
            float32_flops=flops * (BACKWARD + 1),
            seconds=0.2 * steps,
            peak_bytes=1_000_000_000 + 20 * facts.params,
            disk_bytes=4 * facts.params,
        )
