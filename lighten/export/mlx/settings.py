"""Settings of the export to MLX: a model directory becomes one that mlx_lm opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from lighten.errors import RequestError
from lighten.export.mlx import families
from lighten.export.mlx.groups import GROUPS, check_groups
from lighten.export.step import Export
from lighten.facts import ModelFacts
from lighten.model.export_formats import PROMPT, Usage
from lighten.model.formats import FORMATS
from lighten.step import Estimate, Step

DEFAULT_GROUP = 64
MXFP4 = (4, 32)
"""Bits and group of MXFP4."""
_WIDTHS = {"float32": 32, "float16": 16, "bfloat16": 16}
_SECONDS = 2e-8
"""Seconds per weight."""

OPEN = f"""\
from mlx_lm import generate, load

model, tokenizer = load(folder)
print(generate(model, tokenizer, prompt="{PROMPT}", max_tokens=40))
"""


class Mlx(Export):
    """Writes `model.safetensors` with `config.json`, and the files of the tokenizer."""

    work: ClassVar[str] = "lighten.export.mlx.step:run"
    version: ClassVar[int] = 1
    runtime: ClassVar[str] = "mlx"
    library: ClassVar[str] = "mlx"
    calibrated: ClassVar[bool] = False

    format: Literal["mlx"] = Field(description="what to write")
    bits: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        None, description="mlx: round an unquantized model to so many bits, as MLX does (nothing is rounded)"
    )
    group_size: Literal[32, 64, 128] | None = Field(None, description=f"weights that share a scale ({DEFAULT_GROUP})")
    mode: Literal["affine", "mxfp4"] | None = Field(
        None, description="how MLX rounds: codes with scale and bias, or 4-bit floats in blocks of 32 (affine)"
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="mlx: of all that is not quantized, and of the arithmetic (as in the source)"
    )
    embedding: Literal["float", "int2", "int3", "int4", "int5", "int6", "int8"] | None = Field(
        None, description="precision of embedding and head (as the rest; of a quantized source as they are)"
    )

    @model_validator(mode="after")
    def _rounds_or_not(self) -> Self:
        if self.mode == "mxfp4" and ((self.bits or MXFP4[0]), (self.group_size or MXFP4[1])) != MXFP4:
            raise ValueError("mode mxfp4 has 4 bits in groups of 32: leave out `bits` and `group_size`")
        if self.mode == "affine" and self.bits is None:
            raise ValueError("mode affine rounds to `bits`: give them too, or leave out both")
        if self.group_size and not (self.rounds or self.embedding_bits):
            raise ValueError("group_size is for rounding: give `bits` too, or leave out both")
        return self

    @property
    def rounds(self) -> bool:
        """Whether the linears of an unquantized model are rounded."""
        return self.bits is not None or self.mode == "mxfp4"

    @property
    def embedding_bits(self) -> int | None:
        """Bits that embedding and head are rounded to by a setting of their own."""
        return int(self.embedding.removeprefix("int")) if self.embedding and self.embedding != "float" else None

    @property
    def widths(self) -> tuple[int, int]:
        """Bits and group of the linears of an unquantized model."""
        return MXFP4 if self.mode == "mxfp4" else (self.bits or 16, self.group_size or DEFAULT_GROUP)

    @property
    def rounded(self) -> bool:
        """Whether weights are rounded here. Those of a quantized source are already rounded."""
        return self.rounds or self.embedding_bits is not None

    def exact(self, facts: ModelFacts) -> bool:
        """Plain numbers of 32 bits hold everything of a source, and float16 holds more of it than bfloat16."""
        return self.dtype in ("float32", "float16")

    def after(self, previous: Step | None) -> Self:
        """Refuses codes in groups that are no runs of neighbouring inputs; `previous` may say so before any work."""
        if getattr(previous, "order", None) is True and getattr(previous, "group_size", -1) != -1:
            raise RequestError(
                "MLX holds groups of neighbouring inputs only, and desc_act: true scatters them: set desc_act: static, "
                "which rounds in the same order and keeps groups together, or group_size: -1"
            )
        return self

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        return Usage("mlx-lm", OPEN)

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Packages: `mlx_lm` to round and to compare."""
        return [("mlx", "mlx"), ("mlx_lm", "mlx")]

    def requires(self) -> list[tuple[str, str]]:
        """MLX rounds, and runs what is compared. What is only written, and not compared, needs neither."""
        compared = self.parity is None or self.parity.tokens > 0
        return self.needs() if compared or self.rounded else []

    def check(self, facts: ModelFacts) -> None:
        """Refuses rows that groups do not divide."""
        if self.rounds:
            _check_rows(facts, self.widths[1])
        elif self.embedding_bits and facts.hidden % (group := self.group_size or DEFAULT_GROUP):
            raise RequestError(f"embedding: its rows of {facts.hidden} are no multiple of group_size {group}")

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses formats that cannot be read, and settings that would round codes a second time."""
        if form not in ("hf", *FORMATS):
            more = ": mlx_lm opens that directory as it is" if form == "mxfp4" else ""
            raise RequestError(f"MLX export reads model directories, this one is {form}{more}")
        if form == "hf":
            return
        if self.rounds:
            given = next(name for name in ("bits", "mode") if getattr(self, name) is not None)
            raise RequestError(f"the weights of a {form} model are kept as they are: leave out `{given}`")
        _check_rows(facts, GROUPS[-1])

    def check_files(self, folder: Path, facts: ModelFacts) -> None:
        """Refuses families that mlx_lm has no class for, and codes that MLX cannot hold."""
        from lighten.model.checkpoint import Checkpoint

        checkpoint = Checkpoint(folder)
        families.check(checkpoint.config)
        if checkpoint.quantization:
            check_groups(checkpoint)

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the weights, and the time that reading and writing them takes."""
        bits, group = self.widths
        width = bits + 32 / group if self.rounds else _WIDTHS[self.dtype or "bfloat16"]
        held = 4 * facts.vocab * facts.hidden + (2 * facts.params if self.rounds else 0)
        return Estimate(
            seconds=5 + _SECONDS * facts.params,
            peak_bytes=700_000_000 + held,
            disk_bytes=int(facts.params * width / 8),
        )


def _check_rows(facts: ModelFacts, group: int) -> None:
    """Raises RequestError, with the names of all rows that a group does not divide."""
    rows = {
        "hidden size": facts.hidden,
        "attention": facts.heads * facts.head_dim,
        "intermediate size": facts.intermediate,
    }
    if odd := [f"{name} {width}" for name, width in rows.items() if width % group]:
        others = [each for each in GROUPS if each < group and not any(width % each for width in rows.values())]
        advice = f"set group_size: {others[0]}" if others else "export it without rounding, or to GGUF"
        raise RequestError(f"groups of {group} do not divide the rows of this model ({', '.join(odd)}): {advice}")
