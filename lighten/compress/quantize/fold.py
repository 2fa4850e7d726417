"""Scaling the inputs of linears without changing the model: the inverse goes into what makes those inputs.

A linear whose weight columns are multiplied by s gives the same output when its inputs are divided by s. The norm or
linear before it can do that division for free. AWQ and SmoothQuant differ only in how they choose s.
"""

from __future__ import annotations

import torch

from lighten.model.anatomy import BEFORE

Tensors = dict[str, torch.Tensor]


def copies(tensors: Tensors, first: str) -> int:
    """Returns the number of heads that repeat each channel of the inputs of `first`.

    With grouped queries the output projection reads every value head several times. Such channels share a scale.
    Returns 0 if nothing before it can take the scale.
    """
    before = BEFORE.get(first)
    if before is None or f"{before}.weight" not in tensors:
        return 0
    return tensors[f"{first}.weight"].shape[1] // len(tensors[f"{before}.weight"])


def shared(values: torch.Tensor, repeats: int, head_dim: int) -> torch.Tensor:
    """Returns the mean over the heads that repeat a channel, spread to all of them again, `[in]`."""
    if repeats == 1:
        return values
    heads = values.reshape(-1, repeats, head_dim).mean(1, keepdim=True)
    return heads.expand(-1, repeats, -1).reshape(-1)


def exact(scale: torch.Tensor, tensors: Tensors, first: str) -> torch.Tensor:
    """Returns a nearby scale such that a norm's weight, divided by it, needs no rounding in its stored type."""
    norm = tensors[f"{BEFORE[first]}.weight"]
    if norm.dim() > 1:  # a linear: it is quantized after, from its scaled weight in float32
        return scale
    divided = (norm.float() / scale).to(norm.dtype).float()
    return torch.where(divided == 0, 1.0, norm.float() / torch.where(divided == 0, 1.0, divided))


def fold(tensors: Tensors, first: str, linears: list[str], scale: torch.Tensor, head_dim: int) -> None:
    """Multiplies the columns of `linears` by a scale `[in]` and divides what makes their inputs by it, in place.

    Args:
        tensors: of one decoder layer, by name; linears become float32.
        first: the first of `linears`.
        linears: all that read these inputs.
        scale: positive; equal for channels that heads repeat.
        head_dim: channels of a head.
    """
    for linear in linears:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"].float() * scale
    before = BEFORE[first]
    repeats = copies(tensors, first)
    if repeats > 1:
        scale = scale.reshape(-1, repeats, head_dim)[:, 0].reshape(-1)
    for name in (f"{before}.weight", f"{before}.bias"):
        if name in tensors:
            old = tensors[name]
            divided = old.float() / (scale if old.dim() == 1 else scale[:, None])
            tensors[name] = divided if old.dim() > 1 else divided.to(old.dtype)
