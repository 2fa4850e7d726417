"""Scaling the inputs of linears without changing the model: the inverse goes into what makes those inputs.

A linear whose weight columns are multiplied by s gives the same output when its inputs are divided by s. The norm or
linear before it can do that division for free. AWQ and SmoothQuant differ only in how they choose s. What is before a
linear, and can take s, is found by `model/folds`.
"""

from __future__ import annotations

import torch

from lighten.model.folds import Fold

Tensors = dict[str, torch.Tensor]


def shared(values: torch.Tensor, repeats: int, head_dim: int) -> torch.Tensor:
    """Returns the mean over the heads that repeat a channel, spread to all of them again, `[in]`."""
    if repeats == 1:
        return values
    heads = values.reshape(-1, repeats, head_dim).mean(1, keepdim=True)
    return heads.expand(-1, repeats, -1).reshape(-1)


def exact(scale: torch.Tensor, tensors: Tensors, place: Fold) -> torch.Tensor:
    """Returns a nearby scale such that a norm's weight, divided by it, needs no rounding in its stored type."""
    norm = tensors[f"{place.before}.weight"]
    if norm.dim() > 1:  # a linear: it is quantized after, from its scaled weight in float32
        return scale
    whole = norm.float() + place.offset
    divided = (whole / scale - place.offset).to(norm.dtype).float() + place.offset
    return torch.where(divided == 0, 1.0, whole / torch.where(divided == 0, 1.0, divided))


def fold(tensors: Tensors, place: Fold, scale: torch.Tensor, head_dim: int) -> None:
    """Multiplies the columns of linears by a scale `[in]` and divides what makes their inputs by it, in place.

    Args:
        tensors: of one decoder layer, by name; linears become float32.
        place: the linears, and what takes the scale over.
        scale: positive; equal for channels that heads repeat.
        head_dim: channels of a head.
    """
    for linear in place.linears:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"].float() * scale
    if place.repeats > 1:
        scale = scale.reshape(-1, place.repeats, head_dim)[:, 0].reshape(-1)
    weight = tensors[f"{place.before}.weight"]
    bias = f"{place.before}.bias"
    if weight.dim() == 1:
        tensors[f"{place.before}.weight"] = ((weight.float() + place.offset) / scale - place.offset).to(weight.dtype)
        if bias in tensors:
            tensors[bias] = (tensors[bias].float() / scale).to(tensors[bias].dtype)
        return
    rows = slice(place.start, place.start + len(scale))
    wide = weight.to(torch.float32, copy=True)
    wide[rows] /= scale[:, None]
    tensors[f"{place.before}.weight"] = wide
    if bias in tensors:
        moved = tensors[bias].clone()
        moved[rows] = (moved[rows].float() / scale).to(moved.dtype)
        tensors[bias] = moved
