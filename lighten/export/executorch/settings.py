"""Settings of the export to ExecuTorch: a model directory becomes a program for phones and small boards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lighten.errors import RequestError
from lighten.export.step import Export
from lighten.facts import ModelFacts
from lighten.model.export_formats import PROMPT, Usage
from lighten.model.formats import FORMATS
from lighten.step import Estimate

KEPT = tuple(name for name, each in FORMATS.items() if each.codes_exported)
"""Formats whose codes go into the program unchanged."""
SMALLEST_GROUP = 32
"""XNNPACK takes groups whose size is a multiple of it."""
CONTEXT = 2048
"""Positions of the cache, if the model takes as many."""
_BITS = {"fp32": 32, "int8": 8, "int4": 4, None: 4}
_SECONDS = {32: 8, 8: 20, 4: 20}
"""Seconds per layer, by bits: what takes the time is the number of operators, not their size."""

_CODE = f"""\
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

runner = TextLLMRunner(f"{{folder}}/model.pte", f"{{folder}}/tokenizer.json")
runner.generate("{PROMPT}", GenerationConfig(max_new_tokens=40, temperature=0.0))
"""
_ALSO = (
    "On Android and iOS, ExecuTorch's `LlmModule` and `TextLLMRunner` open `model.pte` with `tokenizer.json`. Link the "
    "XNNPACK backend, the custom operators for language models, and the quantized kernels. On Linux boards the program "
    "`llama_main --model_path model.pte --tokenizer_path tokenizer.json` does it."
)


class ExecuTorch(Export):
    """Writes `model.pte` for XNNPACK, with the files of the tokenizer beside it."""

    work: ClassVar[str] = "lighten.export.executorch.step:run"
    version: ClassVar[int] = 5
    runtime: ClassVar[str] = "executorch"
    library: ClassVar[str] = "executorch"
    calibrated: ClassVar[bool] = False

    format: Literal["executorch"] = Field(description="what to write")
    type: Literal["fp32", "int8", "int4"] | None = Field(
        None, description="type of the weights (default: int4; GPTQ and AWQ weights are kept)"
    )
    group_size: Literal[32, 64, 128, 256] = Field(32, description="weights that share a scale, in int4 of executorch")
    embedding: Literal["int8", "float"] = Field(
        "int8", description="precision of embedding and head where the rest is int8, int4 or kept"
    )
    context: int | None = Field(
        None, ge=8, description=f"positions of the cache (default: {CONTEXT}, or what the model takes)"
    )

    @property
    def bits(self) -> int:
        """Bits of the weights of linears."""
        return _BITS[self.type]

    @property
    def rounded(self) -> bool:
        """Whether something is rounded."""
        return self.type != "fp32"

    def exact(self, facts: ModelFacts) -> bool:
        """Whether plain numbers of 32 or 16 bits are written unchanged."""
        return self.type == "fp32"

    def keeps(self, form: str) -> bool:
        """Returns whether the codes of a source of such a format go into the program."""
        return form in KEPT and self.type in (None, "int4")

    def positions(self, facts: ModelFacts) -> int:
        """Returns the number of positions of the cache."""
        if self.context is not None:
            return self.context
        return min(CONTEXT, facts.context or CONTEXT)

    def group(self, inputs: int, name: str) -> int | None:
        """Returns the inputs of a group of a linear; None for 8 bits, which have one scale for each output.

        Raises:
            RequestError: no group of XNNPACK divides the inputs.
        """
        if self.bits == 8:
            return None
        size: int = self.group_size
        while size >= SMALLEST_GROUP:
            if inputs % size == 0:
                return size
            size //= 2
        raise RequestError(
            f"{name} has {inputs} inputs, which no group of 4-bit weights divides: set type: int8 or fp32"
        )

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """The package that writes the program, and runs it."""
        return [("executorch", "executorch")]

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        return Usage("executorch", _CODE, _ALSO) if "model.pte" in files else None

    def check(self, facts: ModelFacts) -> None:
        """Refuses a cache that is longer than the model's positions."""
        if self.context is not None and facts.context and self.context > facts.context:
            raise RequestError(f"context: {self.context} is more than the {facts.context} positions of the model")

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses quantized weights that could only be held after they were rounded again."""
        if form not in ("hf", *FORMATS):
            raise RequestError(
                f"ExecuTorch programs are made of unquantized models and of {', '.join(FORMATS)}, and this one is "
                f"{form}: export the model that it was made from"
            )
        if form != "hf" and self.type in (None, "int4") and form not in KEPT:
            raise RequestError(
                f"the weights of a {form} model would be rounded twice: set type: fp32, which unpacks them, or export "
                "the model that it was made from"
            )

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the weights, and about the time and memory that the conversion takes."""
        size = int(facts.params * self.bits / 8)
        return Estimate(
            seconds=30 + _SECONDS[self.bits] * facts.layers,
            peak_bytes=1_500_000_000 + 16 * facts.params,
            disk_bytes=size,
        )
