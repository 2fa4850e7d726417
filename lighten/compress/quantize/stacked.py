"""gpt-oss's own form of MXFP4: the matrices of all experts of a layer in one tensor of blocks, and one of scales."""

from __future__ import annotations

import torch

from lighten.compress.quantize.methods.mxfp4 import Mxfp4
from lighten.model.discovery import Layer
from lighten.model.quantized.mxfp4 import BLOCKS, SCALES

Tensors = dict[str, torch.Tensor]


def gathered(layer: Layer, parts: dict[str, Tensors]) -> Tensors:
    """Returns the tensors of a layer by name without its prefix.

    Args:
        layer: says where each matrix lies in the tensor of all experts.
        parts: `weight_packed [out, in / 2]` and `weight_scale [out, in / 32]` of each linear, by its name.

    Returns:
        `X_blocks [experts, out, in / 32, 16]` and `X_scales [experts, out, in / 32]` for each tensor X of experts. The
        outputs of gates and of `up` alternate as they do in the source.
    """
    found: Tensors = {}
    places = {linear.name: linear.stored for linear in layer.linears if linear.stored is not None}
    experts = 1 + max((place.expert or 0 for place in places.values()), default=0)
    for name, tensors in parts.items():
        place = places[name]
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        blocks = packed.view(*scales.shape, Mxfp4.block // 2)
        rows = len(scales) * place.step
        for ending, tensor in ((BLOCKS, blocks), (SCALES, scales)):
            whole = f"{place.tensor}{ending}"
            if whole not in found:
                found[whole] = torch.zeros(experts, rows, *tensor.shape[1:], dtype=torch.uint8, device=tensor.device)
            found[whole][place.expert or 0, place.start :: place.step] = tensor
    return found
