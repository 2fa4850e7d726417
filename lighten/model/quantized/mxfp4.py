"""Experts in MXFP4, as gpt-oss is published: codes of 4 bits in blocks of 32 that share a power of two.

The format is that of the OCP Microscaling specification, v1.0. Values fit bfloat16 exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighten.errors import Failure
from lighten.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the names of the two stored tensors."""


class Mxfp4Checkpoint(Checkpoint):
    """A model directory whose experts are in MXFP4. `X` has the values of `X_blocks` and `X_scales`."""

    def _is_packed(self, name: str) -> bool:
        return f"{name}{BLOCKS}" in self.weight_map and f"{name}{SCALES}" in self.weight_map

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor on the CPU, in bfloat16 if it was packed."""
        if not self._is_packed(name):
            return super().tensor(name)
        try:
            return unpack(super().tensor(f"{name}{BLOCKS}"), super().tensor(f"{name}{SCALES}"))
        except ValueError as error:
            raise Failure(f"{self.path}: {name} cannot be unpacked, for {error}: a damaged file") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that exists once the experts are unpacked."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in super().shapes().items():
            whole = name.removesuffix(BLOCKS).removesuffix(SCALES)
            if whole == name or not self._is_packed(whole):
                found[name] = shape
            elif name.endswith(BLOCKS):
                experts, rows, groups, half = shape
                found[whole] = (experts, groups * half * 2, rows)
        return found


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the values, bfloat16 `[experts, in, out]`.

    Args:
        blocks: uint8 `[experts, out, groups, 16]`, the first of two codes in the lower half of a byte.
        scales: uint8 `[experts, out, groups]`, exponents of two plus 127.

    Raises:
        ValueError: a scale is NaN.
    """
    import torch

    from lighten.model import e2m1

    values = e2m1.values_of(e2m1.unpack(blocks)) * e2m1.powers(scales)[..., None]
    return values.flatten(-2).transpose(1, 2).to(torch.bfloat16).contiguous()
