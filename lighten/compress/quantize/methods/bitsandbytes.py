"""The common part of the methods that bitsandbytes runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import Quantize


class FourBits(Quantize):
    """One of 16 values for each weight, scaled block by block."""

    rounds: ClassVar[str] = "lighten.compress.quantize.nearest:bnb_4bit"
    stored_as: ClassVar[str] = "bitsandbytes"

    if TYPE_CHECKING:  # each method declares these
        block_size: int = 64
        double_quant: bool = True

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        return configs.bnb_4bit_config(self.method, self.double_quant, left)
