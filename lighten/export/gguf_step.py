"""The export step to GGUF: a model directory becomes one file for llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lighten.budget import Budget
from lighten.errors import RequestError
from lighten.export.step import Export, about
from lighten.stage import Context, Estimate, ModelFacts
from lighten.store import Artifact

_BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.56,
    "Q5_K_M": 5.7,
    "Q4_K_M": 4.9,
    "Q4_0": 4.6,
    "Q3_K_M": 3.95,
    "Q2_K": 3.2,
}
"""Bits per weight where every row is a multiple of 256, for predictions."""
_FALLBACK_BITS = {"Q6_K": 8.1, "Q5_K_M": 6.6, "Q4_K_M": 6.2, "Q3_K_M": 5.5, "Q2_K": 5.2}
"""The same where the rows of the hidden size are not: what SmolLM2-135M (576) came to."""

_WRITE_SECONDS = 2e-8
"""Per weight, to write the plain file: 2.5 s for SmolLM2-135M on two cores."""
_QUANTIZE_SECONDS = {"Q8_0": 5e-9, "Q4_0": 5e-9}
"""Per weight, for the types faster than the K-quants' 1.5e-8: 0.6 s against 2 s for SmolLM2-135M."""


_TRY_SECONDS = 5e-7
"""Per weight, to try all types: 65 s of one core's time for SmolLM2-135M."""


class Gguf(Export):
    """Writes one file `model-<type>.gguf`, or `model-budget.gguf`."""

    version: ClassVar[int] = 1

    format: Literal["gguf"] = Field(description="what to write")
    type: Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "budget"] = Field(
        "Q4_K_M", description="llama.cpp's name of the type of the weights, or what a budget makes of it"
    )
    imatrix: bool = Field(False, description="weigh rounding errors by the mean square of the inputs")
    budget: Budget | None = Field(
        None, description="instead of a type: a type for every tensor, so that the file fits (size=90MB or bits=4.5)"
    )

    @model_validator(mode="before")
    @classmethod
    def _budget_chooses(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("budget") is None:
            return value
        if value.get("type", "budget") != "budget":
            raise ValueError("a budget chooses the types: leave out either `type` or `budget`")
        if value.get("imatrix", True) is not True:
            raise ValueError("a budget needs the importance matrix: leave out `imatrix`")
        return {**value, "type": "budget", "imatrix": True}

    @model_validator(mode="after")
    def _budget_given(self) -> Self:
        if self.type == "budget" and self.budget is None:
            raise ValueError("type budget needs a `budget`: size=90MB, or bits=4.5")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_budget(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out a budget that is not there, so that a step without one keeps its key."""
        settings: dict[str, Any] = dump(self)
        return {name: value for name, value in settings.items() if name != "budget" or value}

    @property
    def quantized(self) -> bool:
        """Whether llama.cpp quantizes the weights."""
        return self.type not in ("F32", "F16", "BF16")

    def needs_sweep(self) -> bool:
        """True with an importance matrix: it is the diagonal of the Grams. A budget needs all of them."""
        return self.imatrix and self.quantized

    def needs_sensitivity(self) -> bool:
        """True with a budget: errors of different matrices are weighed by what they cost the loss."""
        return self.budget is not None

    def requires(self) -> list[tuple[str, str]]:
        """`gguf` to write, `llama_cpp` to quantize."""
        return [("gguf", "gguf"), *([("llama_cpp", "gguf")] if self.quantized else [])]

    def check(self, facts: ModelFacts) -> None:
        """Refuses architectures that cannot be written, and widths that the type's blocks do not fit."""
        from lighten.export.gguf_families import family_of

        family_of(facts)
        widths = (facts.hidden, facts.heads * facts.head_dim, facts.intermediate)
        if self.type in ("Q8_0", "Q4_0") and (odd := [width for width in widths if width % 32]):
            raise RequestError(
                f"type {self.type} needs rows that are multiples of 32, this model has rows of {odd[0]}: use F16"
            )

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the file, the largest tensor in memory, and time by what SmolLM2-135M took.

        While it runs, the step also holds the plain file, unless there is a budget: 2 bytes a weight.
        """
        largest = max(facts.vocab * facts.hidden, facts.hidden * facts.intermediate)
        if self.budget:
            size = self.budget.size or int((self.budget.bits or 0) * facts.params / 8)
            seconds = _WRITE_SECONDS + _TRY_SECONDS / (os.cpu_count() or 1)
        else:
            bits = _FALLBACK_BITS.get(self.type, _BITS[self.type]) if facts.hidden % 256 else _BITS[self.type]
            size = int(facts.params * bits / 8)
            seconds = _WRITE_SECONDS + (_QUANTIZE_SECONDS.get(self.type, 1.5e-8) if self.quantized else 0.0)
        return Estimate(
            seconds=seconds * facts.params,
            float32_flops=_trial_flops(facts) if self.budget else 0.0,
            peak_bytes=500_000_000 + 12 * largest,
            disk_bytes=size,
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the file and returns its facts.

        Raises:
            RequestError: the source is not a plain Hugging Face directory.
        """
        if source.format != "hf":
            raise RequestError(
                f"GGUF export reads unquantized models, this one is {source.format}: export before quantizing, "
                "and let `type` choose the bits"
            )
        from lighten.export import gguf, gguf_quantize
        from lighten.model.checkpoint import Checkpoint

        file = out / f"model-{self.type}.gguf"
        origin = about(source)
        weights = None
        if self.needs_sweep():
            if context.grams is None or (self.budget and context.sensitivity is None):
                asked = "a budget" if self.budget else "imatrix: true"
                raise RequestError(f"{asked} needs a calibration set: name one under calibration")
            weights = gguf_quantize.importance(context.grams, Checkpoint(source.path).facts)
            if self.budget:
                from lighten.export.budget import Prices, fit
                from lighten.model.sensitivity import Sensitivity

                assert context.sensitivity
                draft = gguf.Draft(source.path, origin)
                context.warnings += draft.warnings
                prices = Prices(context.grams, Sensitivity.read(context.sensitivity))
                chosen = fit(draft, file, self.budget.size, self.budget.bits, prices, weights, context.report)
                return {**gguf_quantize.describe(file, self.type), "imatrix": True, **chosen}
        if not self.quantized:
            context.warnings += gguf.write(source.path, file, self.type, context.report, origin)
            return {**gguf_quantize.describe(file, self.type), "imatrix": False}
        plain = out / "plain.gguf"
        try:
            context.warnings += gguf.write(source.path, plain, None, about=origin)
            gguf_quantize.quantize(plain, file, self.type, weights, context.report)
        finally:
            plain.unlink(missing_ok=True)
        return {**gguf_quantize.describe(file, self.type), "imatrix": weights is not None}


def _trial_flops(facts: ModelFacts) -> float:
    """Returns what the output errors of ten types of every matrix take: products of the rounding errors with H."""
    hidden, queries = facts.hidden, facts.heads * facts.head_dim
    weighed = hidden * hidden * (queries + 2 * facts.kv_heads * facts.head_dim) + queries * queries * hidden
    weighed += hidden * hidden * 2 * facts.intermediate + facts.intermediate**2 * hidden
    return 10.0 * 2 * weighed * facts.layers
