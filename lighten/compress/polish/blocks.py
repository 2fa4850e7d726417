"""Linears whose weights lie in ggml's blocks. The float16 numbers of each block train, and all codes stay.

A weight is `W = d · scale · level − dmin · min`, with one `d` and one `dmin` for a block. So `∂L/∂d` is the sum of
`scale · level · ∂L/∂W` over the block, and `∂L/∂dmin` that of `−min · ∂L/∂W`, exactly. What is kept are levels, scales
and mins, a byte each. Weights are made anew for every product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lighten.compress.polish.coded import by_scales, dense
from lighten.model.gguf.blocks import Grid

Back = Callable[[list[torch.Tensor]], torch.Tensor]
"""Makes the weight of a linear of the matrices that a file has instead; linear in them."""


class Blocks(nn.Module):
    """One matrix of a file. Its d and dmin are d₀ · exp(θ), and θ trains."""

    def __init__(self, grid: Grid) -> None:
        """Takes over the fields of a matrix `[out, in]`."""
        super().__init__()
        kind = grid.kind
        self.parts = kind.block // kind.part
        levels = torch.tensor(kind.levels, dtype=torch.int8)
        both = [grid.d, grid.dmin] if kind.has_mins else [grid.d]
        self.levels: torch.Tensor
        self.scales: torch.Tensor
        self.mins: torch.Tensor
        self.first: torch.Tensor
        self.register_buffer("levels", levels[grid.codes.int()].contiguous())
        self.register_buffer("scales", grid.scales.to(torch.int8))
        self.register_buffer("mins", grid.mins.to(torch.int8))
        self.register_buffer("first", torch.stack(both).float())
        self.theta = nn.Parameter(torch.zeros_like(self.first))

    @torch.no_grad()
    def rounded(self) -> torch.Tensor:
        """Returns d, and dmin if there is one, rounded to float16: float32 `[1 or 2, out, blocks]`."""
        return (self.first * self.theta.exp()).half().float()

    def steps(self, *, stored: bool) -> list[torch.Tensor]:
        """Returns what levels are multiplied by, and what is taken off if there are mins: `[out, in / part]` each.

        d and dmin are as they are, or as they would be `stored`.
        """
        now = self.rounded() if stored else self.first * self.theta.exp()
        wholes = (self.scales, self.mins)[: len(now)]
        return [each.repeat_interleave(self.parts, 1) * whole for each, whole in zip(now, wholes, strict=True)]

    def weight(self, steps: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Returns the weights `[out, in]` for such `steps`, as ggml computes them."""
        if len(steps) == 1:
            return dense(self.levels, steps[0], dtype)
        found = dense(self.levels, steps[0], torch.float32).view(*steps[1].shape, -1)
        return found.sub_(steps[1][..., None]).to(dtype).view_as(self.levels)

    def by_steps(self, by_weight: torch.Tensor) -> list[torch.Tensor]:
        """Returns the derivatives by `steps`, float32 `[out, in / part]` each, from the derivative by the weights."""
        parts = self.scales.shape[1]
        found = [by_scales(by_weight, self.levels, parts)]
        if len(self.first) > 1:
            sums = torch.sum(by_weight.view(len(by_weight), parts, -1), -1, dtype=torch.float32)
            found.append(sums.neg_())
        return found


class _Product(torch.autograd.Function):
    """`inputs · Wᵀ + bias`, of which only the inputs and what levels are multiplied by are kept."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, bias: torch.Tensor | None, linear: BlockLinear, *steps: torch.Tensor
    ) -> torch.Tensor:
        ctx.linear = linear
        ctx.save_for_backward(inputs, *steps)
        return functional.linear(inputs, linear.joined(steps, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, change: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, *steps = ctx.saved_tensors
        linear: BlockLinear = ctx.linear
        rows = change.reshape(-1, change.shape[-1])
        by_inputs = None
        if ctx.needs_input_grad[0]:
            by_inputs = (rows @ linear.joined(steps, rows.dtype)).view_as(inputs)
        by_weight = rows.t() @ inputs.reshape(-1, inputs.shape[-1])
        by_steps: list[torch.Tensor] = []
        for matrix, part in zip(linear.matrices, linear.by_matrix(by_weight), strict=True):
            by_steps += matrix.by_steps(part)
        return by_inputs, None, None, *by_steps


class BlockLinear(nn.Module):
    """A linear whose weight is made of one matrix of a file, or of several."""

    def __init__(
        self, matrices: Sequence[Blocks], back: Back, bias: torch.Tensor | None, dtype: torch.dtype = torch.float32
    ) -> None:
        """`matrices` are in the order that `back` takes them in."""
        super().__init__()
        self.matrices, self.back, self.dtype = list(matrices), back, dtype
        kinds = [torch.zeros_like(each.levels, dtype=dtype, device="meta") for each in matrices]
        self.exact = back(kinds).dtype == dtype
        """Whether values only move on their way; what is computed is computed in float32."""
        self.registered = nn.ModuleList(matrices)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.out_features, self.in_features = self.stored().shape

    def steps(self, *, stored: bool) -> list[torch.Tensor]:
        """Returns the `steps` of all matrices, one after the other."""
        return [each for matrix in self.matrices for each in matrix.steps(stored=stored)]

    def joined(self, steps: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight `[out, in]`."""
        left, found = list(steps), []
        for matrix in self.matrices:
            own, left = left[: len(matrix.first)], left[len(matrix.first) :]
            found.append(matrix.weight(own, dtype if self.exact else torch.float32))
        return self.back(found).to(dtype).contiguous()

    def by_matrix(self, by_weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns the derivatives by the matrices of the file, from the derivative by the weight."""
        with torch.enable_grad():
            zeros = [torch.zeros_like(each.levels, dtype=by_weight.dtype).requires_grad_() for each in self.matrices]
            made = self.back(zeros)
            return [each.contiguous() for each in torch.autograd.grad(made, zeros, by_weight.to(made.dtype))]

    @torch.no_grad()
    def stored(self) -> torch.Tensor:
        """Returns the weight `[out, in]` as it would be stored now."""
        return self.joined(self.steps(stored=True), self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out, in]` as it is now, for models whose own code asks for it."""
        return self.joined(self.steps(stored=False), self.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the outputs: in training by d and dmin as they are, else as they are stored."""
        steps = self.steps(stored=not torch.is_grad_enabled())
        found: torch.Tensor = _Product.apply(inputs, self.bias, self, *steps)  # type: ignore[no-untyped-call]
        return found
