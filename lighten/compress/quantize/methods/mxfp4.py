"""`mxfp4`: 4-bit floats in blocks of 32 that share a power of two (OCP Microscaling)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lighten.compress.quantize import configs
from lighten.compress.quantize.methods.blocks import Blocks
from lighten.compress.quantize.settings import Ignore


class Mxfp4(Blocks):
    """Settings of `mxfp4`."""

    block: ClassVar[int] = 32
    layout: ClassVar[str] = "mxfp4-pack-quantized"
    tries: ClassVar[int] = 3

    method: Literal["mxfp4"] = Field("mxfp4", description="how to choose the codes")
    bits: Literal[4] = Field(4, description="bits of a weight")
    rounding: Literal["gptq", "scales", "nearest"] = Field(
        "gptq",
        description="mxfp4, nvfp4: gptq makes errors good in later columns, scales only searches the scales of blocks, "
        "nearest takes them from the largest weight (default: gptq)",
    )
    activations: bool = Field(
        False, description="mxfp4, nvfp4: round inputs to 4 bits too, block by block as they come (default: no)"
    )
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="gptq: share of the mean of diag(H) that is added to it (default: 0.05)"
    )
    propagate: Literal["auto", "off"] = Field(
        "off", description="gptq: auto rounds each layer against what the quantized layers before it give"
    )
    ignore: Ignore = ()

    def needs_sweep(self) -> bool:
        """Whether Grams are read."""
        return self.rounding != "nearest"

    def arguments(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the weights."""
        return configs.float_blocks(32, "group", "torch.uint8", dynamic=False)

    def of_inputs(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the inputs, whose scales are made as they come."""
        return configs.float_blocks(32, "group", "torch.uint8", dynamic=True)
