"""The common part of the methods that compute in 8-bit integers: a scale per output, and one per token."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import Quantize, check_head
from lighten.facts import ModelFacts


class Integers(Quantize):
    """8-bit weights and inputs."""

    rounds: ClassVar[str] = "lighten.compress.quantize.nearest:integers"
    rounds_head: ClassVar[str] = "lighten.compress.quantize.nearest:integers"
    stored_as: ClassVar[str] = "compressed-tensors"

    if TYPE_CHECKING:  # each method declares it
        head: Literal["keep", 8] = "keep"

    @property
    def quantizes_head(self) -> bool:
        """Whether the output head is rounded too."""
        return self.head == 8

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if the head is to be quantized and is also the embedding."""
        check_head(self.head, facts)

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        groups = [(configs.integers(8, -1, True), ["Linear"])]
        return configs.compressed_config(groups, configs.per_token("int"), "int-quantized", left)
