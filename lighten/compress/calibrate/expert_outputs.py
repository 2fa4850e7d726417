"""The derivatives of the loss by what each matrix of an expert gives, seen while a block runs with gradients.

transformers multiplies by a part of the tensor that holds all experts. Such a product is known by where its weight lies
in memory. An expert's mean is over the tokens that the router sent to it, as its Gram is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lighten.model.discovery import Layer, Linear

PRODUCTS = (
    nn.functional.linear,
    torch.matmul,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.bmm,
)


@dataclass
class _Stack:
    """A tensor that holds matrices of all experts."""

    size: int
    """Numbers of one expert."""
    experts: int
    readers: dict[int, list[Linear]] = field(default_factory=dict)
    """Its matrices, by expert."""


class ExpertOutputs(TorchFunctionMode):
    """Adds up squares of derivatives while it is active. `means` then tells them by matrix."""

    def __init__(self, layer: Layer, block: nn.Module) -> None:
        """Finds the tensors of the experts of a filled block."""
        super().__init__()
        self.names: list[str] = []
        """Names of the matrices, without the layer's prefix."""
        self._stacks: dict[int, _Stack] = {}
        self._sums: dict[str, list[float]] = {}
        for linear in layer.linears:
            if linear.inside is None or linear.inside.expert is None:
                continue
            weight = block.get_submodule(linear.module).get_parameter(linear.inside.tensor)
            stack = _Stack(weight[0].numel(), len(weight))
            stack = self._stacks.setdefault(weight.untyped_storage().data_ptr(), stack)
            stack.readers.setdefault(linear.inside.expert, []).append(linear)
            self.names.append(linear.name)

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch, and watches what products with experts give."""
        found: Any = function(*args, **(kwargs or {}))
        if not self._stacks or function not in PRODUCTS or len(args) < 2 or not found.requires_grad:
            return found
        states, weight = args[0], args[1]
        stack = self._stacks.get(weight.untyped_storage().data_ptr()) if isinstance(weight, torch.Tensor) else None
        if stack is not None and weight.dim() == 3:
            given = states.detach().abs().sum(-1) > 0  # where an expert has no token the states are zero
            found.register_hook(self._of_all(stack, given))
        elif stack is not None:
            found.register_hook(self._of_one(stack.readers.get(weight.storage_offset() // stack.size, [])))
        return found

    def _of_one(self, readers: list[Linear]) -> Callable[[torch.Tensor], None]:
        return lambda gradient: self._add(readers, gradient, gradient.shape[:-1].numel())

    def _of_all(self, stack: _Stack, given: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            for expert, readers in stack.readers.items():
                rows = given[expert]
                self._add(readers, gradient[expert][rows], int(rows.sum()))

        return hook

    def _add(self, readers: list[Linear], gradient: torch.Tensor, tokens: int) -> None:
        for linear in readers:
            assert linear.inside is not None
            spot, wide = linear.inside, gradient.float()
            if spot.outputs is not None:
                wide = wide[..., spot.start : spot.start + spot.outputs * spot.step : spot.step]
            sums = self._sums.setdefault(linear.name, [0.0, 0.0])
            sums[0] += float(wide.square().sum())
            sums[1] += tokens * linear.shape[0]

    def means(self) -> dict[str, float]:
        """Returns the mean squares by matrix. Where an expert got no token, it is the mean of the other experts'."""
        known = {name: total / count for name, (total, count) in self._sums.items() if count}
        parts: dict[str, list[float]] = {}
        for name, mean in known.items():
            parts.setdefault(name.rpartition(".")[2], []).append(mean)
        means = {part: sum(each) / len(each) for part, each in parts.items()}
        found = {name: known.get(name, means.get(name.rpartition(".")[2])) for name in self.names}
        return {name: mean for name, mean in found.items() if mean is not None}
