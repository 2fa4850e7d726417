"""The formats of compressed-tensors: packed integers, unpacked integers or 8-bit floats, 4-bit floats in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lighten.model import e2m1
from lighten.model.packing import unpack
from lighten.model.quantized.packed import Codes, Packed, Parts, Shapes

FLOAT_BLOCKS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
"""Weights that share a scale, of the formats with 4-bit floats in blocks."""
LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", *FLOAT_BLOCKS)


class Compressed(Packed):
    """Linears in a format of compressed-tensors."""

    def refusal(self) -> str | None:
        """Returns the layout, the scales or the rotation, if they are not known."""
        if self.settings.get("transform_config"):
            return "its inputs are rotated (transform_config)"
        groups = [
            (str(group.get("format") or self.settings.get("format")), group.get("weights") or {})
            for group in (self.settings.get("config_groups") or {}).values()
        ]
        for layout, weights in groups:
            strategy, size = weights.get("strategy"), weights.get("group_size")
            if strategy == "block" or (strategy == "tensor_group") != (layout == "nvfp4-pack-quantized"):
                return "scales of blocks"
            if layout in FLOAT_BLOCKS and size != FLOAT_BLOCKS[layout]:
                return f"format {layout} in blocks of {size}"
            if layout in FLOAT_BLOCKS and not weights.get("symmetric", True):
                return f"format {layout} with zero points"
        found = {layout for layout, _ in groups}
        return next((f"format {layout}" for layout in sorted(found - set(LAYOUTS))), None)

    def linears(self, names: Iterable[str]) -> list[str]:
        """Returns the quantized linears."""
        known = set(names)
        found = []
        for name in names:
            linear, _, part = name.rpartition(".")
            if part == "weight_packed" or (part == "weight_scale" and f"{linear}.weight" in known):
                found.append(linear)
        return found

    def weight(self, parts: Parts) -> torch.Tensor:
        """Returns the weight of a linear, `[out, in]` in float32."""
        if "weight_packed" in parts and parts["weight_packed"].dtype == torch.uint8:
            return float_blocks(parts["weight_packed"], parts["weight_scale"], parts.get("weight_global_scale"))
        scales = parts["weight_scale"].float()
        if "weight_packed" not in parts:
            codes = parts["weight"].float()
            if "weight_zero_point" in parts:
                codes = codes - _columns(parts["weight_zero_point"].float(), codes.shape[1], parts)
            return codes * _columns(scales, codes.shape[1], parts)
        return self.codes(parts).weight()

    def codes(self, parts: Parts) -> Codes:
        """Returns a linear of packed integers as codes."""
        rows, columns = (int(size) for size in parts["weight_shape"])
        bits = parts["weight_packed"].shape[1] * 32 // columns
        codes = unpack(parts["weight_packed"].t().contiguous(), bits, columns)
        scales = parts["weight_scale"]
        scales = scales if scales.dim() > 1 else scales.reshape(-1, 1)
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int32)
        if "weight_zero_point" in parts:
            zeros = unpack(parts["weight_zero_point"], bits, rows)
        neighbours = torch.arange(columns) // (columns // scales.shape[1])
        g_idx = parts["weight_g_idx"].long() if "weight_g_idx" in parts else neighbours
        return Codes(codes, scales.t(), zeros.t(), g_idx, bits)

    def steps(self, parts: Parts) -> torch.Tensor | None:
        """Returns the scale of every weight of a linear, `[out, in]` in float32; None for floats."""
        stored = parts.get("weight_packed", parts.get("weight"))
        if stored is None or stored.is_floating_point() or stored.dtype == torch.uint8:
            return None
        known = parts["weight_shape"].tolist() if "weight_packed" in parts else parts["weight"].shape
        return _columns(parts["weight_scale"].float(), int(known[1]), parts).expand(int(known[0]), int(known[1]))

    def shape(self, linear: str, stored: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        """Returns `[out, in]` of a linear."""
        if f"{linear}.weight_packed" in stored and f"{linear}.weight_shape" not in stored:  # two codes a byte
            rows, half = stored[f"{linear}.weight_packed"]
            return (rows, 2 * half)
        if f"{linear}.weight_packed" in stored:
            return tuple(int(size) for size in read(f"{linear}.weight_shape"))
        return stored[f"{linear}.weight"]


def float_blocks(packed: torch.Tensor, stored: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    """Returns the weight `[out, in]` of 4-bit floats in blocks, float32.

    Args:
        packed: `[out, in / 2]`, uint8.
        stored: `[out, blocks]`, exponents of MXFP4 or E4M3 scales of NVFP4.
        divisor: the `weight_global_scale` of NVFP4, by which the scales were multiplied.

    Raises:
        ValueError: a scale or a weight is not finite.
    """
    return e2m1.weight(packed, e2m1.scales(stored, divisor))


def _columns(values: torch.Tensor, inputs: int, parts: Parts) -> torch.Tensor:
    """Returns values of groups of inputs `[out or 1, groups]` as values of inputs."""
    if values.dim() < 2 or values.shape[1] == 1:
        return values
    if "weight_g_idx" in parts:
        return values[:, parts["weight_g_idx"].long()]
    return values.repeat_interleave(inputs // values.shape[1], 1)
