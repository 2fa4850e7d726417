"""Settings of the export to GGUF: a model directory becomes one file for llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lighten.errors import RequestError, reading
from lighten.export.gguf.types import COMPENSATED, KEEPING, PLAIN, TYPES, TypeName
from lighten.export.gguf.usage import usage
from lighten.export.step import Export
from lighten.facts import ModelFacts
from lighten.model import llama_library
from lighten.model.export_formats import Usage
from lighten.model.formats import FORMATS, MXFP4
from lighten.settings import Budget, parse_size
from lighten.step import Estimate, Step, beside_the_source

_READABLE = ("hf", *FORMATS, MXFP4)
"""Formats of directories whose weights can be read, or unpacked."""

CODED = ("gptq", "awq", "compressed-tensors")
"""Formats of directories whose weights are whole numbers of steps."""

_WRITE_SECONDS = 2e-8
"""Seconds per weight to write the plain file: 2.5 s for SmolLM2-135M on two cores."""
_QUANTIZE_SECONDS = {"Q8": 5e-9, "Q4_": 5e-9, "Q5_": 5e-9, "Q": 1.5e-8, "TQ": 5e-9, "MX": 5e-9, "IQ4": 6e-8, "IQ": 3e-7}
"""Seconds per weight, by the beginning of the type's name. SmolLM2-135M on two cores: 0.6 s for Q8_0, 2 s for Q4_K_M.
"""

_TRY_SECONDS = 5e-7
"""Seconds per weight to try all types: 65 s of one core's time for SmolLM2-135M."""
_ROUNDING_SECONDS = 8e-7
"""Seconds per weight of one core's time to round again, besides the products with H: 90 s for SmolLM2-135M."""
_ROUNDING_PRODUCTS = 11
"""Products of the matrices with the H of their inputs that this takes; a budget takes one for each of ten types."""


def _bytes(size: Any) -> Any:
    return parse_size(size) if isinstance(size, str) else size


class Gguf(Export):
    """Writes one file `model-<type>.gguf`, or `model-budget.gguf`."""

    work: ClassVar[str] = "lighten.export.gguf.step:run"
    version: ClassVar[int] = 4
    runtime: ClassVar[str] = "llama.cpp"
    library: ClassVar[str] = "gguf"
    for_devices: ClassVar[bool] = True

    format: Literal["gguf"] = Field(description="what to write")
    type: TypeName = Field(
        "Q4_K_M",
        description="llama.cpp's name of the type of the weights, or what a budget makes of it; for openvino: fp32, "
        "fp16, bf16, int8, int4",
    )
    imatrix: bool = Field(False, description="weigh rounding errors by the mean square of the inputs")
    budget: Budget | None = Field(
        None, description="instead of a type: a type for every tensor, so that the file fits (size=90MB or bits=4.5)"
    )
    rounding: Literal["gptq", "keep"] | None = Field(
        None,
        description="gptq: let the errors of a matrix make good for each other; keep: the codes of a quantized source, "
        "where they fit (default: as llama.cpp rounds)",
    )
    propagate: Literal["auto"] | None = Field(
        None,
        description="auto, with rounding gptq: each matrix also makes good the errors of those before it, as the "
        "quantized model runs beside the other (default: every matrix by itself)",
    )
    split: Annotated[int, BeforeValidator(_bytes)] | None = Field(
        None, gt=0, description="cut a larger file into parts of so many bytes (2GB), which llama.cpp opens together"
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

    @model_validator(mode="before")
    @classmethod
    def _rounding_weighs(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("rounding") != "gptq":
            return value
        if value.get("imatrix", True) is not True:
            raise ValueError("rounding gptq begins with the importance matrix: leave out `imatrix`")
        return {**value, "imatrix": True}

    @model_validator(mode="after")
    def _budget_given(self) -> Self:
        if self.type == "budget" and self.budget is None:
            raise ValueError("type budget needs a `budget`: size=90MB, or bits=4.5")
        if self.budget is None and TYPES[self.type].needs_imatrix and not self.imatrix:
            raise ValueError(f"llama.cpp rounds to {self.type} with an importance matrix only: set imatrix: true")
        return self

    @model_validator(mode="after")
    def _can_compensate(self) -> Self:
        known = {"gptq": COMPENSATED, "keep": KEEPING}.get(self.rounding or "")
        if known and self.type not in known:
            raise ValueError(f"rounding {self.rounding} knows {', '.join(known)}, and not {self.type}")
        if self.propagate and self.rounding != "gptq":
            raise ValueError("propagate: auto is for rounding: gptq: set both, or neither")
        return self

    def after(self, previous: Step | None) -> Self:
        """Returns the step; it keeps the codes of a source that has some, if the type can hold them."""
        coded = previous is not None and previous.writes in CODED
        keeps = coded and self.rounding is None and self.type in KEEPING
        return self.model_copy(update={"rounding": "keep"}) if keeps else self

    optional: ClassVar[tuple[str, ...]] = ("parity", "budget", "split", "rounding", "propagate")

    @property
    def rounded(self) -> bool:
        """Whether llama.cpp quantizes the weights."""
        return self.type not in PLAIN

    @property
    def scales_train(self) -> bool:
        """Whether all blocks of the type are codes with a float16 scale."""
        return self.type in COMPENSATED

    def needs_sweep(self) -> bool:
        """True with an importance matrix (the diagonal of the Grams), a budget or `rounding` (the whole Grams)."""
        return self.imatrix and self.rounded

    def needs_sensitivity(self) -> bool:
        """True with a budget: errors of different matrices are weighed by their cost for the loss."""
        return self.budget is not None

    def exact(self, facts: ModelFacts) -> bool:
        """F32 holds everything of a source of 32 bits, and F16 holds more of it than bfloat16."""
        return self.type in ("F32", "F16")

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        return usage(files)

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Packages: `gguf` to write, llama.cpp to quantize and to compare."""
        return [("gguf", "gguf"), (llama_library.module(), "gguf")]

    def check(self, facts: ModelFacts) -> None:
        """Refuses architectures that cannot be written, and widths that the type's blocks do not fit."""
        from lighten.model.gguf.table import family_of

        family_of(facts)
        widths = (facts.hidden, facts.heads * facts.head_dim, facts.intermediate)
        block = 1 if self.budget else TYPES[self.type].block
        if odd := [width for width in widths if width % block]:
            raise RequestError(
                f"type {self.type} needs rows that are multiples of {block}, this model has rows of {odd[0]}: use F16"
            )

    def remarks(self, facts: ModelFacts) -> list[str]:
        """Names the rows that no block of a K-quant fits."""
        widths = {facts.hidden, facts.heads * facts.head_dim, facts.intermediate}
        odd = ", ".join(str(width) for width in sorted(widths) if width % 256)
        if self.budget or TYPES[self.type].fallback_bits is None or not odd:
            return []
        return [
            f"blocks of {self.type} hold 256 weights, and this model has rows of {odd}: llama.cpp gives the matrices "
            "with these rows other types, most of them larger; a budget chooses types that fit"
        ]

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses everything except model directories, and Grams of quantized weights."""
        if form not in _READABLE:
            raise RequestError(f"GGUF export reads model directories, this one is {form}")
        if form not in CODED and self.rounding == "keep":
            raise RequestError(f"rounding keep is for quantized models, this one is {form}: leave it out")
        if form != "hf" and self.needs_sweep():
            raise RequestError(
                f"{'a budget' if self.budget else 'an importance matrix'} is measured on an unquantized "
                f"model, this one is {form}: export it without, or export the model that it was made from"
            )

    def check_files(self, folder: Path, facts: ModelFacts) -> None:
        """Refuses tokenizers that llama.cpp cannot follow."""
        from lighten.export.gguf.tokenizer import read_vocabulary
        from lighten.model.checkpoint import read_config

        with reading(folder / "tokenizer.json", "fetch the model again"):
            read_vocabulary(folder, facts.vocab, read_config(folder))

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the file, the largest tensor in memory, and the time that SmolLM2-135M took.

        While it runs, the step also holds the plain file, unless there is a budget: 2 bytes a weight.
        """
        largest = max(facts.vocab * facts.hidden, facts.hidden * facts.intermediate)
        if self.budget:
            size = self.budget.size or int((self.budget.bits or 0) * facts.params / 8)
            seconds = _WRITE_SECONDS + _TRY_SECONDS / (os.cpu_count() or 1)
        else:
            bits = TYPES[self.type].bits
            if facts.hidden % 256:
                bits = TYPES[self.type].fallback_bits or bits
            size = int(facts.params * bits / 8)
            seconds = _WRITE_SECONDS + (_quantize_seconds(self.type) if self.rounded else 0.0)
        products, bytes_of_layers = 10 if self.budget else 0, 0
        if self.rounding:
            products += _ROUNDING_PRODUCTS
            seconds += _ROUNDING_SECONDS / (os.cpu_count() or 1)
            inner = max(facts.hidden, facts.intermediate)
            bytes_of_layers = 4 * (8 * facts.hidden * facts.intermediate + 5 * inner**2) * (os.cpu_count() or 1)
        alone = Estimate(
            seconds=seconds * facts.params,
            float32_flops=products * _product_flops(facts),
            peak_bytes=500_000_000 + 12 * largest + bytes_of_layers,
            disk_bytes=size,
        )
        return beside_the_source(alone, facts, calibration_tokens) if self.propagate else alone


def _quantize_seconds(type: str) -> float:
    """Returns the seconds that rounding a weight takes."""
    name = type if "_K" not in type else "Q"
    return _QUANTIZE_SECONDS[max((start for start in _QUANTIZE_SECONDS if name.startswith(start)), key=len)]


def _product_flops(facts: ModelFacts) -> float:
    """Returns the operations for the products of all matrices with the H of their inputs."""
    hidden, queries = facts.hidden, facts.heads * facts.head_dim
    weighed = hidden * hidden * (queries + 2 * facts.kv_heads * facts.head_dim) + queries * queries * hidden
    weighed += hidden * hidden * 2 * facts.intermediate + facts.intermediate**2 * hidden
    return 2.0 * weighed * facts.layers
