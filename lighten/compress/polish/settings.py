"""Settings of the `polish` step, in which the scales of a quantized model learn from its source."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field

from lighten.compress.distill.teacher import Teacher
from lighten.compress.quantize.methods import METHODS
from lighten.compress.quantize.settings import Quantize, either
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.step import Estimate, Step

GROUP = 64
"""Weights of a scale, for the estimate."""
KEPT = 4_000_000_000
"""Bytes of what layers compute that are kept for the way back; more is computed again."""

WRITTEN = 512
"""Tokens of a sequence that the source writes, about: as many as a sequence of the calibration set has."""


class Polish(Step):
    """Training of the scales of integer codes on the distributions of the model that was quantized. The codes stay.

    The codes are those of a directory, or those of the blocks of a GGUF file.
    """

    kind: ClassVar[str] = "polish"
    work: ClassVar[str] = "lighten.compress.polish.step:run"
    version: ClassVar[int] = 1
    keeps_form: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    teacher: ClassVar[str] = "unquantized"

    epochs: float = Field(1.0, gt=0, description="passes over the calibration set")
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    written: int = Field(0, ge=0, description="sequences that the source writes besides, to learn from too")
    batch_tokens: int = Field(1024, ge=8, description="tokens of a step, in whole sequences")
    lr: float = Field(1e-3, gt=0, description="largest learning rate of the logarithms of the scales")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    temperature: float = Field(1.0, gt=0, le=20, description="T of the distributions that are compared")
    beta2: float = Field(0.95, gt=0, lt=1, description="of Adam")
    validation: float = Field(0.06, gt=0, le=0.5, description="share of the calibration set that is held out")
    validate_every: int | None = Field(None, ge=1, description="steps between looks at it (default: a tenth of all)")
    patience: int = Field(3, ge=1, description="looks without a better one after which it stops")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    seed: int = Field(0, ge=0)

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key. Checkpoints change nothing; the text is a stage of its own."""
        return self.model_dump(mode="json", exclude={"save_every", "written"})

    def lessons(self) -> Step:
        """Returns the stage that cuts the calibration set into sequences; the plan says which set that is."""
        return Teacher.model_validate({"top_k": 0, "validation": self.validation, "written": self.written})

    def after(self, previous: Step | None) -> Self:
        """Refuses what has no scales of integer codes.

        Raises:
            RequestError: the step before it left none, or they are polished already.
        """
        able = either([name for name, method in METHODS.usable().items() if method.scales_train])
        if previous is None or not previous.writes or previous.kind == self.kind:
            raise RequestError("its scales are polished already: raise epochs or lr instead of polishing again")
        if previous.kind == "export":
            return self._after_export(previous)
        if isinstance(previous, Quantize) and not previous.scales_train:
            raise RequestError(
                f"polish trains the scales of integer codes in groups, which {previous.method} has not: quantize with "
                f"{able}"
            )
        if previous.writes == "hf":
            raise RequestError(
                f"polish trains the scales of a quantized model, and this one is not quantized: put it after quantize "
                f"with {able}, or after an export to GGUF"
            )
        if previous.kind not in ("quantize", "source", "file"):
            raise RequestError(f"polish reads what quantize wrote ({able}), and this model is {previous.writes}")
        return self

    def _after_export(self, previous: Step) -> Self:
        """Refuses files without scales that can train."""
        if not getattr(previous, "scales_train", False):
            named = " of type ".join(str(each) for each in (previous.writes, getattr(previous, "type", None)) if each)
            raise RequestError(
                f"polish trains the scales of codes in blocks, which {named} has not: export to gguf with a K-quant "
                "(Q2_K to Q6_K), Q4_0 to Q5_1, Q8_0 or IQ4_NL"
            )
        return self

    def bytes_between(self, facts: ModelFacts) -> int:
        """Returns about how many bytes one layer computes for the tokens of a step."""
        return 2 * self.batch_tokens * (24 * facts.hidden + 6 * facts.intermediate)

    def recomputes(self, facts: ModelFacts) -> bool:
        """Whether layers compute again on the way back what they gave on the way there. The result is the same."""
        return facts.layers * self.bytes_between(facts) > KEPT

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the source's pass over the set, then forward once or twice and backward for every trained token."""
        linears, head = facts.layers * facts.layer_linear_params, facts.vocab * facts.hidden
        calibration_tokens += self.written * WRITTEN
        trained = self.steps * self.batch_tokens if self.steps else self.epochs * calibration_tokens
        looked = 11 * self.validation * calibration_tokens
        again = self.recomputes(facts)
        flops = 2.0 * linears * (calibration_tokens + (4 if again else 3) * trained + looked)
        flops += 2.0 * head * (3 * trained + 2 * looked)
        steps = trained / self.batch_tokens
        between = self.bytes_between(facts) * (1 if again else facts.layers)
        between += 2 * self.batch_tokens * facts.layers * facts.hidden
        held = 3 * linears + 4 * facts.embedding_params + 28 * linears // GROUP
        return Estimate(
            fast_flops=flops,
            seconds=8e-9 * facts.vocab * (trained + looked) + steps * 3e-9 * linears,
            peak_bytes=int(700_000_000 + held + between + 2 * calibration_tokens * facts.hidden),
            disk_bytes=int(linears * (4 + 20 / GROUP) / 8) + 2 * facts.embedding_params,
        )
