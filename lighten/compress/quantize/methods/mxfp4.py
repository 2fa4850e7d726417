"""`mxfp4`: 4-bit floats in blocks of 32 that share a power of two (OCP Microscaling)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lighten.compress.quantize import configs
from lighten.compress.quantize.methods.blocks import Blocks
from lighten.compress.quantize.settings import Ignore
from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model.formats import MXFP4


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
    form: Literal["compressed-tensors", "gpt-oss"] = Field(
        "compressed-tensors",
        description="mxfp4: gpt-oss for that model's own form: all experts of a layer in one tensor, everything else "
        "as it is (default: compressed-tensors)",
    )
    ignore: Ignore = ()

    @model_validator(mode="after")
    def _holds_all_experts(self) -> Self:
        if self.experts_only and (self.ignore or self.activations):
            raise ValueError(
                "form gpt-oss holds all experts, and says nothing of inputs: leave out ignore, activations"
            )
        return self

    @property
    def experts_only(self) -> bool:
        """Whether only experts are rounded."""
        return self.form == "gpt-oss"

    @property
    def format(self) -> str:
        """Format of the stored model."""
        return MXFP4 if self.experts_only else self.stored_as

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that are given."""
        return {name: value for name, value in super().key_config().items() if name != "form" or self.experts_only}

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if blocks do not fit, or the model is not the one whose form is asked for."""
        super().check(facts)
        if self.experts_only and facts.architecture != "GptOssForCausalLM":
            raise RequestError(f"form gpt-oss is for gpt-oss, and this model is {facts.architecture}: leave it out")

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        if self.experts_only:
            return configs.mxfp4_config(left)
        return super().config(widths, left)

    def needs_sweep(self) -> bool:
        """Whether Grams are read."""
        return self.rounding != "nearest"

    def arguments(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the weights."""
        return configs.float_blocks(32, "group", "torch.uint8", dynamic=False)

    def of_inputs(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the inputs, whose scales are made as they come."""
        return configs.float_blocks(32, "group", "torch.uint8", dynamic=True)
