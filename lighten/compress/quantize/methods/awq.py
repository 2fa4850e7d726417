"""`awq`: channels that matter are scaled up before rounding, then each group is clipped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import GroupSize, Ignore, Quantize, check_groups, grouped_bits, output_widths
from lighten.errors import RequestError
from lighten.facts import ModelFacts


class Awq(Quantize):
    """Settings of `awq`."""

    rounds: ClassVar[str] = "lighten.compress.quantize.awq:codes"
    scales: ClassVar[str] = "lighten.compress.quantize.awq:scale"
    swept: ClassVar[bool] = True
    stored_as: ClassVar[str] = "awq"
    scales_train: ClassVar[bool] = True

    method: Literal["awq"] = Field("awq", description="how to choose the codes")
    bits: Literal[4] = Field(4, description="bits of a weight")
    group_size: GroupSize = 128
    sym: bool = Field(False, description="symmetric grid, which the format has not")
    ignore: Ignore = ()

    @model_validator(mode="after")
    def _has_zero_points(self) -> Self:
        if self.sym:
            raise ValueError("the awq format has a zero point per group: sym is for gptq and rtn")
        return self

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if a group or a packed word does not divide a width of the model."""
        check_groups(self.group_size, facts)
        for name, width in output_widths(facts).items():
            if width % 8:
                raise RequestError(f"the awq format packs 8 outputs to a word; the {name} {width} is no multiple of 8")

    def why_left(self, shape: tuple[int, int]) -> str | None:
        """Returns why a linear `[out, in]` cannot be stored in groups, or in whole words."""
        rows, columns = shape
        if self.group_size != -1 and columns % self.group_size:
            return f"its {columns} inputs are no multiple of the group size {self.group_size}"
        return f"its {rows} outputs do not fill words of 8" if rows % 8 else None

    def cost(self, facts: ModelFacts) -> tuple[float, float]:
        """Returns the float32 operations, and the seconds of passes over the weights, on such a model."""
        product = facts.layer_linear_params * facts.hidden * (1 + facts.intermediate / facts.hidden / 3)
        return float(facts.layers * (14 * 2 * product)), 4e-8 * facts.layers * facts.layer_linear_params

    def stored_bits(self, facts: ModelFacts) -> float:
        """Returns about the bits of a weight, with its share of scales and zero points."""
        return grouped_bits(self.bits, self.group_size, facts)

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        return configs.awq_config(self.bits, self.group_size, left)
