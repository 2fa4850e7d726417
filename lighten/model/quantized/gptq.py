"""The `gptq` format: words of codes along the inputs, zero points less one in its first version."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lighten.model.packing import gptq_zeros, unpack
from lighten.model.quantized.packed import Codes, Packed, Parts, Shapes


class Gptq(Packed):
    """Linears in the `gptq` format."""

    def refusal(self) -> str | None:
        """Returns the version, if it is not one of the two known versions."""
        version = self.settings.get("checkpoint_format", "gptq")
        return None if version in ("gptq", "gptq_v2") else f"checkpoint_format {version}"

    def linears(self, names: Iterable[str]) -> list[str]:
        """Returns the quantized linears."""
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def codes(self, parts: Parts) -> Codes:
        """Returns a linear as codes."""
        words, scales = parts["qweight"], parts["scales"]
        inputs = len(words) * 32 // self._bits()
        neighbours = torch.arange(inputs) // (inputs // len(scales))
        g_idx = parts.get("g_idx", neighbours)  # GPTQModel leaves it out where groups are of neighbours
        bits = len(words) * 32 // g_idx.numel()
        less_one = self.settings.get("checkpoint_format", "gptq") != "gptq_v2"
        zeros = gptq_zeros(parts["qzeros"], bits, scales.shape[1], less_one=less_one)
        return Codes(unpack(words, bits, g_idx.numel()), scales, zeros, g_idx.long(), bits)

    def weight(self, parts: Parts) -> torch.Tensor:
        """Returns the weight of a linear, `[out, in]` in float32."""
        return self.codes(parts).weight()

    def steps(self, parts: Parts) -> torch.Tensor:
        """Returns the scale of every weight of a linear, `[out, in]` in float32."""
        return self.codes(parts).steps()

    def shape(self, linear: str, stored: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        """Returns `[out, in]` of a linear."""
        words, grouped = stored[f"{linear}.qweight"], stored.get(f"{linear}.g_idx")
        return (words[1], grouped[0] if grouped else words[0] * 32 // self._bits())

    def _bits(self) -> int:
        return int(self.settings["bits"])
