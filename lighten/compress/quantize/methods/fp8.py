"""`fp8`: 8-bit floats with a scale per output, inputs rounded as they come."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import Ignore, Quantize


class Fp8(Quantize):
    """Settings of `fp8`."""

    rounds: ClassVar[str] = "lighten.compress.quantize.nearest:floats"
    stored_as: ClassVar[str] = "compressed-tensors"

    method: Literal["fp8"] = Field("fp8", description="how to choose the codes")
    bits: Literal[8] = Field(8, description="bits of a weight")
    ignore: Ignore = ()

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        groups = [(configs.floats(), ["Linear"])]
        return configs.compressed_config(groups, configs.per_token("float"), "float-quantized", left)
