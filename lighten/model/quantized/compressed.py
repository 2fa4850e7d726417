"""The formats of compressed-tensors: packed integers, and unpacked integers or 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lighten.model.packing import unpack
from lighten.model.quantized.packed import Packed, Parts, Shapes

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


class Compressed(Packed):
    """Linears in a format of compressed-tensors."""

    def refusal(self) -> str | None:
        """Returns the layout, the scales or the rotation, if they are not known."""
        groups = self.settings.get("config_groups") or {}
        found = {str(group.get("format") or self.settings.get("format")) for group in groups.values()}
        if self.settings.get("transform_config"):
            return "its inputs are rotated (transform_config)"
        if any((group.get("weights") or {}).get("strategy") in ("block", "tensor_group") for group in groups.values()):
            return "scales of blocks"
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
        scales = parts["weight_scale"].float()
        if "weight_packed" not in parts:
            codes = parts["weight"].float()
            if "weight_zero_point" in parts:
                codes = codes - _columns(parts["weight_zero_point"].float(), codes.shape[1], parts)
            return codes * _columns(scales, codes.shape[1], parts)
        rows, columns = (int(size) for size in parts["weight_shape"])
        bits = parts["weight_packed"].shape[1] * 32 // columns
        codes = unpack(parts["weight_packed"].t().contiguous(), bits, columns).t()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            zeros = unpack(parts["weight_zero_point"], bits, rows).float()
        return (codes - _columns(zeros, columns, parts)).float() * _columns(scales, columns, parts)

    def shape(self, linear: str, stored: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        """Returns `[out, in]` of a linear."""
        if f"{linear}.weight_packed" in stored:
            return tuple(int(size) for size in read(f"{linear}.weight_shape"))
        return stored[f"{linear}.weight"]


def _columns(values: torch.Tensor, inputs: int, parts: Parts) -> torch.Tensor:
    """Returns values of groups of inputs `[out or 1, groups]` as values of inputs."""
    if values.dim() < 2 or values.shape[1] == 1:
        return values
    if "weight_g_idx" in parts:
        return values[:, parts["weight_g_idx"].long()]
    return values.repeat_interleave(inputs // values.shape[1], 1)
