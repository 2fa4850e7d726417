"""AWQ: scale the channels that matter up before rounding, then clip each group, by the exact output error.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2024). Their search
runs the layer on kept activations; tr(ΔW H ΔWᵀ) with H = XᵀX is the same squared error, without them.

Weights are `[in, out]` here, as in `grid`.
"""

from __future__ import annotations

import torch

from lighten.compress.quantize import formats
from lighten.compress.quantize.fold import shared
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.grid import Quantized, full_range, quantize, rounding, rtn
from lighten.compress.quantize.linears import Linears
from lighten.compress.quantize.methods.awq import Awq
from lighten.model.grams import Gram
from lighten.model.products import exact_products

COARSE = tuple(step / 8 for step in range(9))
FINE = (-1 / 16, 1 / 16)
ROWS = 512
"""Number of outputs, evenly spaced, that the scale search uses. Every output has a say in the same few scales."""
CLIPS = tuple(1.0 - 0.05 * step for step in range(11))
"""Fractions of the full range that the clip search tries."""


def output_error(change: torch.Tensor, gram: torch.Tensor) -> float:
    """Returns tr(ΔWᵀ H ΔW) for a change `[in, out]`."""
    return float(torch.einsum("io,io->", change, gram @ change))


def search_scale(
    weight: torch.Tensor, gram: torch.Tensor, *, bits: int, group_size: int, sym: bool, repeats: int, head_dim: int
) -> torch.Tensor:
    """Returns the scale per channel, `[in]`, with the least output error after rounding; 1 if none helps.

    It tries s = x^α / w^(1−α). x is the root mean square of a channel's inputs, and w is the mean share of its weights
    in the largest of their group. α goes in steps of an eighth, then of a sixteenth beside the best.

    Args:
        weight: `[out, in]`, every linear that reads these inputs.
        gram: `[in, in]`, float32.
        bits: width of the codes.
        group_size: inputs that share a scale, −1 for all of them.
        sym: symmetric grid.
        repeats: heads that repeat each channel, and so share its scale.
        head_dim: channels of a head.
    """
    wide = weight[:: -(-len(weight) // ROWS)].float()
    width = wide.shape[1]
    activity = shared(gram.diagonal(), repeats, head_dim).clamp(min=0).sqrt()
    groups = wide.abs().reshape(len(wide), -1, width if group_size == -1 else group_size)
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).reshape(-1)
    share = shared(share, repeats, head_dim)
    alive = (activity > 0) & (share > 0)

    def scale_of(alpha: float) -> torch.Tensor:
        raw = activity.clamp(min=1e-12) ** alpha / share.clamp(min=1e-4) ** (1 - alpha)
        raw = raw / (raw[alive].max() * raw[alive].min()).sqrt()
        return torch.where(alive, raw.clamp(1e-4, 1e4), 1.0)

    plain = wide.t().contiguous()

    def error(scale: torch.Tensor) -> float:
        scaled = (plain * scale[:, None]).reshape(-1, width if group_size == -1 else group_size, len(wide))
        change = rounding(scaled, *full_range(scaled, bits, sym), bits).reshape(plain.shape)
        return output_error(change.div_(scale[:, None]), gram)

    best = torch.ones(width, device=wide.device)
    if not alive.any():
        return best
    with exact_products(torch.bfloat16):  # only the order of the candidates matters
        least = error(best)
        chosen = None
        for alpha in COARSE:
            scale = scale_of(alpha)
            if (found := error(scale)) < least:
                least, best, chosen = found, scale, alpha
        if chosen is not None:
            for step in FINE:
                scale = scale_of(chosen + step)
                if (found := error(scale)) < least:
                    least, best = found, scale
    return best


def clip(weight: torch.Tensor, gram: torch.Tensor, *, bits: int, group_size: int, sym: bool) -> Quantized:
    """Rounds a weight `[out, in]` to nearest, with each group's range clipped if that lowers the output error.

    Group after group, every output takes the fraction of the range with the least tr(ΔW H ΔWᵀ), given the results of
    all other groups of that output. So the terms between groups count too.
    """
    start = rtn(weight, bits, group_size, sym)
    w = weight.t().float().contiguous()
    width = len(w)
    size = width if group_size == -1 else group_size
    codes, scales, zeros = start.codes, start.scales.clone(), start.zeros.float()
    change = start.weight().t() - w
    pull = gram @ change
    for number in range(width // size):
        rows = slice(number * size, (number + 1) * size)
        own, block = w[rows], gram[rows, rows]
        others = (pull[rows] - block @ change[rows]).mul_(2)
        least = torch.full_like(scales[0], torch.inf)
        for fraction in CLIPS:
            scale, zero = full_range(own, bits, sym, shrink=fraction)
            moved = rounding(own, scale, zero, bits)
            cost = (block @ moved).add_(others).mul_(moved).sum(0)
            better = cost < least
            least = torch.where(better, cost, least)
            scales[number] = torch.where(better, scale, scales[number])
            zeros[number] = torch.where(better, zero, zeros[number])
        codes[rows] = quantize(own, scales[number], zeros[number], bits).to(torch.uint8)
        best = rounding(own, scales[number], zeros[number], bits)
        pull += gram[:, rows] @ (best - change[rows])
        change[rows] = best
    return Quantized(codes, scales, zeros.int(), start.g_idx)


def scale(step: Awq, weight: torch.Tensor, gram: Gram, repeats: int, head_dim: int) -> torch.Tensor:
    """Returns the scale of every channel that the linears with these weights read, `[in]`."""
    return search_scale(
        weight,
        gram.matrix(),
        bits=step.bits,
        group_size=step.group_size,
        sym=False,
        repeats=repeats,
        head_dim=head_dim,
    )


def codes(step: Awq, linears: Linears) -> list[Stored]:
    """Rounds linears to nearest in ranges that are clipped for the least error of their outputs."""
    found = clip(linears.together, linears.gram, bits=linears.bits, group_size=step.group_size, sym=False)
    return linears.store(found, formats.awq)
