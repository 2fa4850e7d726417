"""Codes of quantized checkpoints in MLX's form: packed words, and for every group a scale and a bias.

A weight is code * scale + bias. The bias of codes with a zero point is -zero * scale. Each row is one little-endian
stream of bits, cut into 32-bit words.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from lighten.errors import Failure
from lighten.export.mlx.groups import largest, refused
from lighten.model.packing import pack
from lighten.model.quantized.packed import Codes, Parts


@dataclass(frozen=True)
class Kept:
    """A quantized linear as MLX stores it."""

    tensors: Parts
    """`weight` `[out, words]`, `scales` and, unless they are floats, `biases` `[out, groups]`."""
    settings: dict[str, Any]
    """`bits`, `group_size` and `mode`, as in config.json."""
    off: float = 0.0
    """Largest difference from the checkpoint's weights, in steps: scales and biases have fewer digits than they."""


def kept(found: Codes, dtype: torch.dtype, where: str) -> Kept:
    """Returns codes as they are; scales and biases in `dtype`.

    Raises:
        RequestError: groups are scattered.
        Failure: groups cannot be cut into those of MLX.
    """
    places = found.g_idx.tolist()
    size = largest(places)
    if size is None:
        if any(one > other for one, other in pairwise(places)):
            raise refused(where)
        raise Failure(f"{where} has groups that cannot be cut into 32 neighbouring inputs: MLX cannot hold them")
    outputs = found.codes.shape[1]
    groups = found.g_idx[::size]
    scales, zeros = (each.float().expand(-1, outputs)[groups].t().contiguous() for each in (found.scales, found.zeros))
    biases = -zeros * scales
    stored_scales, stored_biases = scales.to(dtype), biases.to(dtype)
    # a weight is off by its code times the error of its scale, and by the error of its bias
    most = (1 << found.bits) - 1
    gaps = most * (stored_scales.float() - scales).abs() + (stored_biases.float() - biases).abs()
    off = float((gaps / torch.where(scales == 0, torch.inf, scales.abs())).max())
    words = pack(found.codes, found.bits).t().contiguous()
    return Kept(
        {"weight": words.view(torch.uint32), "scales": stored_scales, "biases": stored_biases},
        {"group_size": size, "bits": found.bits, "mode": "affine"},
        off,
    )


def kept_floats(parts: Parts) -> Kept | None:
    """Returns MXFP4 of compressed-tensors, whose bytes are those of MLX; None for another format."""
    packed, scales = parts.get("weight_packed"), parts.get("weight_scale")
    if packed is None or scales is None or packed.dtype != torch.uint8 or scales.dtype != torch.uint8:
        return None
    words = packed.contiguous().view(torch.uint32)
    return Kept({"weight": words, "scales": scales}, {"group_size": 32, "bits": 4, "mode": "mxfp4"})
