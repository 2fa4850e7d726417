"""Moves the outliers of activations into the weights.

SmoothQuant does it for 8 bits per channel: s_j = max|X_j|^α / max|W_j|^(1−α) (Xiao et al., "SmoothQuant: Accurate
and Efficient Post-Training Quantization for Large Language Models", 2023). Activations are divided by s, weights
multiplied.
With GPTQ it is left to the person, for runtimes that round the activations too.
"""

from __future__ import annotations

import torch

from lighten.compress.quantize.fold import shared
from lighten.compress.quantize.methods.gptq import Gptq
from lighten.compress.quantize.methods.w8a8 import W8a8
from lighten.model.grams import Gram

SMALLEST = 1e-5


def smooth(weight: torch.Tensor, absmax: torch.Tensor, alpha: float, repeats: int, head_dim: int) -> torch.Tensor:
    """Returns the scale of every channel, `[in]`.

    Args:
        weight: `[out, in]`, every linear that reads these inputs.
        absmax: `[in]`, the largest |x| of every channel.
        alpha: 0 leaves the activations as they are, 1 makes them all equally large.
        repeats: heads that repeat each channel, and so share its scale.
        head_dim: channels of a head.
    """
    activations = shared(absmax, repeats, head_dim).clamp(min=SMALLEST)
    weights = shared(weight.float().abs().amax(0), repeats, head_dim).clamp(min=SMALLEST)
    return (activations**alpha / weights ** (1 - alpha)).clamp(min=SMALLEST)


def scale(step: W8a8, weight: torch.Tensor, gram: Gram, repeats: int, head_dim: int) -> torch.Tensor:
    """Returns the scale of every channel that the linears with these weights read, `[in]`."""
    return smooth(weight, gram.absmax, step.alpha, repeats, head_dim)


def even(step: Gptq, weight: torch.Tensor, gram: Gram, repeats: int, head_dim: int) -> torch.Tensor:
    """Returns a scale `[in]` for the inputs of linears that makes them more alike; its logarithms have the mean 0.

    It is a power of the root mean square of each channel, as in AWQ (Lin et al., 2023), which searches the power.
    """
    loud = shared(gram.diagonal().float().sqrt(), repeats, head_dim)
    found = (loud / loud.max().clamp(min=1e-30)).clamp(min=SMALLEST) ** (step.smooth or 0)
    return found / found.log().mean().exp()
