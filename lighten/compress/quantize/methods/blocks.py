"""The common part of the methods that store 4-bit floats in blocks: `mxfp4` and `nvfp4`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import Quantize, input_widths
from lighten.errors import RequestError
from lighten.facts import ModelFacts


class Blocks(Quantize):
    """4-bit floats, a scale for each block of inputs."""

    rounds: ClassVar[str] = "lighten.compress.quantize.floats:blocks"
    stored_as: ClassVar[str] = "compressed-tensors"
    swept: ClassVar[bool] = True

    block: ClassVar[int]
    """Inputs that share a scale."""
    layout: ClassVar[str]
    """compressed-tensors' name of the format."""
    tries: ClassVar[int]
    """Number of scales that are tried for a block, for predictions."""

    if TYPE_CHECKING:  # each method declares these
        rounding: Literal["gptq", "scales", "nearest"] = "gptq"
        activations: bool = False
        damp_percent: float = 0.05
        propagate: Literal["auto", "off"] = "off"

    @property
    def propagates(self) -> bool:
        """Whether each layer is rounded against what the quantized layers before it give."""
        return self.propagate != "off"

    def needs_sums(self) -> bool:
        """Whether the Grams of the sweep are read: not if layers are rounded one after the other."""
        return not self.propagates or self.reads_largest

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that are given."""
        return {name: value for name, value in super().key_config().items() if (name, value) != ("propagate", "off")}

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Refuses settings of the error feedback where there is none."""
        rounding = str(given.get("rounding", "gptq")).casefold()
        if rounding != "gptq" and given.get("propagate", "off") != "off":
            raise ValueError(f"rounding {rounding} makes no errors good: leave out propagate, or take rounding: gptq")
        return given

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if the blocks do not divide the inputs of a linear."""
        for name, width in input_widths(facts).items():
            if width % self.block:
                other = "nvfp4 has blocks of 16, " if self.block != 16 and not width % 16 else ""
                raise RequestError(
                    f"{self.method} has blocks of {self.block} inputs, which do not divide the {name} {width} of this "
                    f"model: {other}gptq and rtn take group_size -1"
                )

    def why_left(self, shape: tuple[int, int]) -> str | None:
        """Returns why a linear `[out, in]` cannot be stored in blocks."""
        columns = shape[1]
        return f"its {columns} inputs are no multiple of the block of {self.block}" if columns % self.block else None

    def cost(self, facts: ModelFacts) -> tuple[float, float]:
        """Returns the float32 operations, and the seconds of passes over the weights, on such a model."""
        if self.rounding == "nearest":
            return 0.0, 2e-8 * facts.layers * facts.layer_linear_params
        product = facts.layer_linear_params * facts.hidden * (1 + facts.intermediate / facts.hidden / 3)
        cubes = 3 * facts.hidden**3 + facts.intermediate**3
        trials = 3e-8 * self.tries * facts.layers * facts.layer_linear_params
        return float(facts.layers * (product + 0.7 * cubes)), trials

    def stored_bits(self, facts: ModelFacts) -> float:
        """Returns the bits of a weight with its share of the scales."""
        return 4 + 8 / self.block

    def arguments(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the weights."""
        raise NotImplementedError

    def of_inputs(self) -> dict[str, Any]:
        """Returns compressed-tensors' arguments of the inputs that are rounded as they come."""
        raise NotImplementedError

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        inputs = self.of_inputs() if self.activations else None
        return configs.compressed_config([(self.arguments(), ["Linear"])], inputs, self.layout, left)
