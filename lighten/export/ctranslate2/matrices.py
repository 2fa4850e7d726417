"""The weights of linears as `[out, in]`: those of transformers' Conv1D, which GPT-2 has, lie the other way round."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn


def is_linear(module: nn.Module) -> TypeGuard[Any]:
    """Returns whether a module multiplies by a matrix of its own."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def matrix(linear: Any) -> torch.Tensor:
    """Returns the weight of a linear, `[out, in]`."""
    weight: torch.Tensor = linear.weight.data
    return weight if isinstance(linear, nn.Linear) else weight.t()


def place(linear: Any, weight: torch.Tensor) -> None:
    """Gives a linear another weight, `[out, in]`."""
    linear.weight.data = (weight if isinstance(linear, nn.Linear) else weight.t()).contiguous()
