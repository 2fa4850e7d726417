"""Scales and codes improved in turn, after the columns were rounded one by one.

With R = H(W − Ŵ), a scale s of codes c that covers the inputs g is best moved by cᵀR_g / cᵀH_gg c, and a code by the
nearest whole number to R_j / (s H_jj). Each such step lowers tr((W − Ŵ)ᵀH(W − Ŵ)), or leaves it as it is. So the codes
meet the errors of columns that were rounded after them, which they could not know.
"""

from __future__ import annotations

import torch

from lighten.compress.quantize.grid import Quantized, storable

BLOCK = 128


def refined(
    weight: torch.Tensor,
    gram: torch.Tensor,
    found: Quantized,
    *,
    bits: int,
    rounds: int,
    kind: torch.dtype = torch.float16,
    gone: torch.Tensor | None = None,
) -> Quantized:
    """Returns codes and scales with less loss on a Gram than those that were found.

    Args:
        weight: `[out, in]`, any float type.
        gram: `[in, in]`, float32: XᵀX. It is damped as it was when the codes were found.
        found: codes, scales and zero points; these are left as they are.
        bits: width of a code.
        rounds: number of times that all scales and all codes are gone through.
        kind: type that the scales are stored in.
        gone: `[out, in]`, which weights are pruned: they stay zero.
    """
    hessian = gram.clone()
    hessian.diagonal().add_(found.damping * float(gram.diagonal().mean()))
    unread = gram.diagonal() == 0
    hessian.diagonal()[unread] = 1.0
    w = weight.t().float().masked_fill(unread[:, None], 0)
    fixed = None if gone is None else gone.t()
    zeros = found.zeros[found.g_idx]
    steps = found.codes.int() - zeros
    scales = found.scales.clone()
    low, high = -zeros, 2**bits - 1 - zeros
    members = [(found.g_idx == group).nonzero()[:, 0] for group in range(len(scales))]
    left = hessian @ (w - steps * scales[found.g_idx])
    for _ in range(rounds):
        for group, rows in enumerate(members):
            own = steps[rows].float()
            energy = (own * (hessian[rows][:, rows] @ own)).sum(0)
            moved = scales[group] + (own * left[rows]).sum(0) / energy.clamp(min=1e-30)
            stays = (energy > 0) & (moved * scales[group] > 0)  # a scale keeps its sign
            moved = torch.where(stays, storable(moved, kind), scales[group])
            left.addmm_(hessian[:, rows], own * (moved - scales[group]), alpha=-1)
            scales[group] = moved
        for start in range(0, len(w), BLOCK):
            part = slice(start, min(start + BLOCK, len(w)))
            change = torch.empty_like(w[part])
            inside, rest = hessian[part, part], left[part].clone()
            for row in range(part.stop - start):
                j = start + row
                scale = scales[found.g_idx[j]]
                best = (steps[j] + rest[row] / (scale * inside[row, row])).round_()
                code = torch.minimum(torch.maximum(best, low[j].float()), high[j].float())
                if fixed is not None:
                    code.masked_fill_(fixed[j], 0)
                torch.mul(code - steps[j], scale, out=change[row])
                steps[j] = code.int()
                rest.addr_(inside[row], change[row], alpha=-1)
            left.addmm_(hessian[:, part], change, alpha=-1)
    return Quantized((steps + zeros).to(torch.uint8), scales, found.zeros, found.g_idx, found.damping)
