"""Settings of the export to OpenVINO: a model directory becomes an IR for openvino-genai."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lighten.errors import RequestError
from lighten.export.openvino.usage import usage
from lighten.export.step import Export
from lighten.facts import ModelFacts
from lighten.model.export_formats import Usage
from lighten.model.formats import FORMATS
from lighten.step import Estimate

KEPT = tuple(name for name, each in FORMATS.items() if each.codes_exported)
"""Formats whose codes go into the graph unchanged."""
FLOATS = ("fp32", "fp16", "bf16")
_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.1, "int4": 5.0}
"""Bits per weight, for predictions."""
_SECONDS = 2e-7
"""Seconds per weight, beside those that are spent on any model."""


class OpenVino(Export):
    """Writes `openvino_model.xml` with its weights beside it, and the tokenizer for openvino and for transformers."""

    work: ClassVar[str] = "lighten.export.openvino.step:run"
    version: ClassVar[int] = 1
    runtime: ClassVar[str] = "openvino"
    library: ClassVar[str] = "openvino"
    calibrated: ClassVar[bool] = False

    format: Literal["openvino"] = Field(description="what to write")
    type: Literal["fp32", "fp16", "bf16", "int8", "int4"] | None = Field(
        None, description="type of the weights (default: int4; GPTQ and AWQ weights are kept)"
    )
    group_size: Literal[16, 32, 64, 128, 256] = Field(64, description="weights that share a scale, in int4 of openvino")
    zero_point: bool = Field(True, description="int4 and int8 of openvino with zero points")
    ignore: tuple[str, ...] = Field(
        (), description="linears that are not to be quantized: patterns such as *.down_proj"
    )
    embedding: Literal["int8", "float"] = Field(
        "int8", description="precision of embedding and head where the rest is int8, int4 or kept"
    )

    @property
    def rounded(self) -> bool:
        """Whether weights are rounded to 8 or 4 bits. GPTQ and AWQ sources are already rounded."""
        return self.type not in FLOATS

    def exact(self, facts: ModelFacts) -> bool:
        """Whether plain numbers of 32 or 16 bits are written unchanged."""
        return self.type in ("fp32", "fp16")

    def keeps(self, form: str) -> bool:
        """Returns whether the codes of a source of such a format go into the graph."""
        return form in KEPT and self.rounded

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        return usage(files)

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Packages that write the graph and the tokenizer, and the package that runs them."""
        return [(name, "openvino") for name in ("openvino", "openvino_tokenizers", "openvino_genai")]

    def check(self, facts: ModelFacts) -> None:
        """Refuses settings that floats have no use for."""
        if self.type in FLOATS and self.ignore:
            raise RequestError(f"`ignore` is for int8 and int4: nothing is rounded to codes in {self.type}")

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses quantized weights that the graph could only hold after they were rounded again."""
        if form not in ("hf", *FORMATS):
            raise RequestError(
                f"OpenVINO graphs are made of unquantized models and of {', '.join(FORMATS)}, and this one is {form}: "
                "export the model that it was made from"
            )
        if form == "hf" or self.type in FLOATS:
            return
        if form not in KEPT:
            raise RequestError(
                f"the weights of a {form} model would be rounded twice: set type: {', '.join(FLOATS)}, which unpacks "
                "them, or export the model that it was made from"
            )
        if self.ignore:
            raise RequestError(f"the weights of a {form} model are kept as they are: leave out `ignore`")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the weights, and about the time and memory that the conversion takes."""
        size = int(facts.params * _BITS[self.type or "int4"] / 8)
        held = 12 if self.type == "fp32" else 6
        return Estimate(
            seconds=20 + _SECONDS * facts.params, peak_bytes=1_200_000_000 + held * facts.params, disk_bytes=size
        )
