"""The contract of a format of quantized checkpoints for its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

Parts = dict[str, torch.Tensor]
"""Stored tensors of one linear, by the rest of their name, after the linear's name and a dot."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Codes:
    """A linear as integer codes: `codes [in, out]`, `scales` and `zeros [groups, out]`, `g_idx [in]`."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int

    def weight(self) -> torch.Tensor:
        """Returns the weight, `[out, in]` in float32."""
        return ((self.codes - self.zeros[self.g_idx]).float() * self.steps().t()).t().contiguous()

    def steps(self) -> torch.Tensor:
        """Returns the scale of every weight, `[out, in]` in float32."""
        return self.scales[self.g_idx].float().t()


class Packed:
    """The linears of a checkpoint in one format; made from the `quantization_config` of its config.json."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def refusal(self) -> str | None:
        """Returns why such a checkpoint cannot be unpacked; None if it can."""
        return None

    def linears(self, names: Iterable[str]) -> list[str]:
        """Returns the quantized linears, from the names of all tensors."""
        raise NotImplementedError

    def weight(self, parts: Parts) -> torch.Tensor:
        """Returns the weight of a linear, `[out, in]` in float32."""
        raise NotImplementedError

    def shape(self, linear: str, stored: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        """Returns `[out, in]` of a linear, from the shapes of all tensors; `read` returns a small tensor."""
        raise NotImplementedError

    def codes(self, parts: Parts) -> Codes:
        """Returns a linear as codes, for formats that store it as `qweight`, `qzeros` and `scales`."""
        raise NotImplementedError

    def steps(self, parts: Parts) -> torch.Tensor | None:
        """Returns the scale of every weight of a linear, `[out, in]` in float32; None for formats without codes."""
        return None
