"""The `awq` format in its GEMM layout: words of eight 4-bit codes along the outputs, in an order of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lighten.model.packing import awq_codes
from lighten.model.quantized.packed import Codes, Packed, Parts, Shapes


class Awq(Packed):
    """Linears in the `awq` format."""

    def refusal(self) -> str | None:
        """Returns the layout or the bits, if they are not known."""
        version, bits = self.settings.get("version", "gemm"), self.settings.get("bits", 4)
        if str(version).lower() != "gemm":
            return f"version {version}"
        return None if bits == 4 else f"{bits} bits"

    def linears(self, names: Iterable[str]) -> list[str]:
        """Returns the quantized linears."""
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def codes(self, parts: Parts) -> Codes:
        """Returns a linear as codes."""
        codes, scales = awq_codes(parts["qweight"]), parts["scales"]
        g_idx = torch.arange(len(codes)) // (len(codes) // len(scales))
        return Codes(codes, scales, awq_codes(parts["qzeros"]), g_idx, 4)

    def weight(self, parts: Parts) -> torch.Tensor:
        """Returns the weight of a linear, `[out, in]` in float32."""
        return self.codes(parts).weight()

    def steps(self, parts: Parts) -> torch.Tensor:
        """Returns the scale of every weight of a linear, `[out, in]` in float32."""
        return self.codes(parts).steps()

    def shape(self, linear: str, stored: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        """Returns `[out, in]` of a linear."""
        inputs, words = stored[f"{linear}.qweight"]
        return (words * 8, inputs)
