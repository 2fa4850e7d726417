"""The common part of the methods that store codes on a grid, in the `gptq` format or in compressed-tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from lighten.compress.quantize import configs
from lighten.compress.quantize.settings import Quantize, check_groups, check_head, grouped_bits, output_widths
from lighten.errors import RequestError
from lighten.facts import ModelFacts


class Coded(Quantize):
    """Codes in groups of inputs."""

    rounds_head: ClassVar[str] = "lighten.compress.quantize.nearest:codes"
    scales_train: ClassVar[bool] = True

    if TYPE_CHECKING:  # each method declares these, with the values that it takes
        group_size: int | Literal["tensor"] = 128
        sym: bool = True
        positive_scales: bool = False
        head: Literal["keep", 8] = "keep"

    @property
    def symmetry(self) -> bool | Literal["positive"]:
        """The form of the grid."""
        positive = getattr(self, "positive_scales", False)  # a method of a plugin may not have it
        return "positive" if self.sym and positive else self.sym

    @property
    def linears_differ(self) -> bool:
        """Whether some linears are stored differently from the rest, which the `gptq` format cannot say."""
        return bool(self.ignore) or self.quantizes_head

    @property
    def quantizes_head(self) -> bool:
        """Whether the output head is rounded too."""
        return self.head == 8

    @property
    def format(self) -> str:
        """Format of the stored model."""
        return "compressed-tensors" if self.linears_differ else "gptq"

    @model_validator(mode="after")
    def _can_be_opened(self) -> Self:
        """Refuses what loaders do not open. transformers expects the zero points of compressed-tensors unpacked."""
        if self.linears_differ and not self.sym:
            raise ValueError(
                "a budget, ignore and head need the compressed-tensors format, in which transformers opens symmetric "
                "grids only: leave out sym: false"
            )
        return self

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if a group or a packed word does not divide a width of the model."""
        check_head(self.head, facts)
        check_groups(self.group_size, facts)
        for name, width in {} if self.linears_differ else output_widths(facts).items():
            if width * (self.bits or 0) % 32:
                raise RequestError(f"{self.bits}-bit codes of the {name} {width} do not fill 32-bit words; use 8 bits")

    def why_left(self, shape: tuple[int, int]) -> str | None:
        """Returns why a linear `[out, in]` cannot be stored in groups, or in whole words."""
        rows, columns = shape
        if isinstance(self.group_size, int) and self.group_size != -1 and columns % self.group_size:
            return f"its {columns} inputs are no multiple of the group size {self.group_size}"
        bits = self.bits or 4
        if not self.linears_differ and (rows * bits % 32 or columns * bits % 32):
            return f"{bits}-bit codes of {rows} x {columns} do not fill 32-bit words"
        return None

    def stored_bits(self, facts: ModelFacts) -> float:
        """Returns about the bits of a weight with its share of scales and zero points."""
        return grouped_bits(self.bits, self.group_size, facts)

    @property
    def config_file(self) -> str | None:
        """Name of a file beside config.json from which tools of GPTQ read the configuration."""
        return None if self.linears_differ else "quantize_config.json"

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        size = -1 if self.group_size == "tensor" else self.group_size
        if not self.linears_differ:
            return configs.gptq_config(self.bits or 0, size, self.sym, **self.order_and_damping)
        by_bits = {bits: [name for name, b in widths.items() if b == bits] for bits in sorted(set(widths.values()))}
        groups = [(configs.integers(bits, size, self.sym), names) for bits, names in by_bits.items()]
        if len(groups) == 1:
            groups = [(groups[0][0], ["Linear"])]
        return configs.compressed_config(groups, None, "pack-quantized", left)

    @property
    def order_and_damping(self) -> dict[str, Any]:
        """Settings of the search in the `gptq` format, besides bits and groups."""
        return {"desc_act": False, "damp_percent": None}
