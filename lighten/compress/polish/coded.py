"""Linears whose weights are frozen integer codes times scales that train.

A weight is `W = c · s` with a scale for each group of inputs. So `∂L/∂s = Σ c · ∂L/∂W` over the group, exactly: nothing
is rounded on the way, and nothing has to be passed straight through. Only codes are kept; weights are made anew for
every product, in the type of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lighten.compress.quantize.grid import storable
from lighten.model.quantized.packed import Codes

ROWS = 128
"""Number of outputs whose derivatives are multiplied by codes at a time, so that they stay in the cache."""


def dense(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns c · s `[out, in]`; codes are `[out, in]` in the order of their groups, scales `[out, groups]`."""
    grouped = codes.view(len(codes), scales.shape[1], -1)
    return (grouped * scales[..., None]).to(dtype).view_as(codes)


def by_scales(by_weight: torch.Tensor, codes: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns Σ c · ∂L/∂W over every group, float32 `[out, groups]`."""
    found = torch.empty(len(codes), groups, device=codes.device)
    for start in range(0, len(codes), ROWS):
        rows = slice(start, start + ROWS)
        part = (by_weight[rows] * codes[rows]).view(-1, groups, codes.shape[1] // groups)
        torch.sum(part, -1, dtype=torch.float32, out=found[rows])
    return found


class _Product(torch.autograd.Function):
    """`inputs · Wᵀ + bias`, of which only the inputs, the codes and the scales are kept."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, scales, codes)
        return functional.linear(inputs, dense(codes, scales, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, change: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, scales, codes = ctx.saved_tensors
        rows = change.reshape(-1, len(codes))
        by_inputs = None
        if ctx.needs_input_grad[0]:
            by_inputs = (rows @ dense(codes, scales, rows.dtype)).view_as(inputs)
        by_weight = rows.t() @ inputs.reshape(-1, codes.shape[1])
        return by_inputs, by_scales(by_weight, codes, scales.shape[1]), None, None


class CodedLinear(nn.Module):
    """A linear in codes. Its scales are s = s₀ · exp(θ), and θ trains."""

    def __init__(self, found: Codes, bias: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        """Takes over stored codes. They are put in the order of their groups, as act-order mixes them."""
        super().__init__()
        codes = (found.codes - found.zeros[found.g_idx]).t()
        order = torch.argsort(found.g_idx, stable=True)
        mixed = not torch.equal(order, torch.arange(len(order)))
        codes = codes[:, order] if mixed else codes
        small = bool(codes.abs().max() < 128)
        self.out_features, self.in_features = codes.shape
        self.kind, self.dtype = found.scales.dtype, dtype
        self.codes: torch.Tensor
        self.first: torch.Tensor
        self.order: torch.Tensor | None
        self.bias: torch.Tensor | None
        self.register_buffer("codes", codes.to(torch.int8 if small else torch.int16).contiguous())
        self.register_buffer("first", found.scales.float().t().contiguous())
        self.register_buffer("order", order if mixed else None)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.theta = nn.Parameter(torch.zeros_like(self.first))

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out, in]` as it is now, for models whose own code asks for it."""
        found = dense(self.codes, self.first * self.theta.exp(), self.dtype)
        return found if self.order is None else found[:, torch.argsort(self.order)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the outputs: in training by the scales as they are, else by the scales as they are stored."""
        if self.order is not None:
            inputs = inputs.index_select(-1, self.order)
        scales = self.first * self.theta.exp() if torch.is_grad_enabled() else self.rounded()
        found: torch.Tensor = _Product.apply(inputs, scales, self.codes, self.bias)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def rounded(self) -> torch.Tensor:
        """Returns the scales `[out, groups]`, float32, rounded to the type that they are stored in."""
        return storable(self.first * self.theta.exp(), self.kind)
