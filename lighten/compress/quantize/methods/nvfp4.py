"""`nvfp4`: 4-bit floats in blocks of 16, their scales in 8-bit floats."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lighten.compress.quantize import configs
from lighten.compress.quantize.methods.blocks import Blocks
from lighten.compress.quantize.settings import Ignore


class Nvfp4(Blocks):
    """Settings of `nvfp4`."""

    block: ClassVar[int] = 16
    layout: ClassVar[str] = "nvfp4-pack-quantized"
    tries: ClassVar[int] = 14

    method: Literal["nvfp4"] = Field("nvfp4", description="how to choose the codes")
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
        """Whether Grams are read, or the largest inputs."""
        return self.rounding != "nearest" or self.activations

    @property
    def reads_largest(self) -> bool:
        """Whether the largest inputs are read: one number for each input says how far its scales reach."""
        return self.activations

    def arguments(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the weights."""
        return configs.float_blocks(16, "tensor_group", "torch.float8_e4m3fn", dynamic=False)

    def of_inputs(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the inputs: scales of blocks as they come, one that is known."""
        return configs.float_blocks(16, "tensor_group", "torch.float8_e4m3fn", dynamic="local")
