"""`nf4`: 16 values that suit normally distributed weights (QLoRA), by bitsandbytes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lighten.compress.quantize.methods.bitsandbytes import FourBits
from lighten.compress.quantize.settings import Ignore


class Nf4(FourBits):
    """Settings of `nf4`."""

    method: Literal["nf4"] = Field("nf4", description="how to choose the codes")
    bits: Literal[4] = Field(4, description="bits of a weight")
    ignore: Ignore = ()
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="nf4, fp4: weights that share a scale (default: 64)"
    )
    double_quant: bool = Field(True, description="nf4, fp4: quantize the scales too (default: yes)")
