"""`int8`: LLM.int8() of bitsandbytes, with 8 bits per output, and outliers of the inputs computed separately."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import Ignore, Quantize


class Int8(Quantize):
    """Settings of `int8`."""

    rounds: ClassVar[str] = "lighten.compress.quantize.nearest:bnb_8bit"
    stored_as: ClassVar[str] = "bitsandbytes"

    method: Literal["int8"] = Field("int8", description="how to choose the codes")
    bits: Literal[8] = Field(8, description="bits of a weight")
    ignore: Ignore = ()

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        return configs.bnb_8bit_config(left)
