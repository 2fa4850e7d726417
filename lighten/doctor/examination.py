"""What the Grams of a sweep show of its calibration text: dead channels, rank, and how the loss moves with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lighten.compress.quantize.gptq import gptq
from lighten.compress.quantize.methods.gptq import Gptq
from lighten.compress.quantize.quantized_layers import relative_error
from lighten.model import anatomy
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import read_index, read_layer
from lighten.step import Report

NEARLY_DEAD = 1e-6
"""Share of the mean of diag(H) below which a channel is nearly dead."""

WIDE = 1024
"""Width from which the rank is computed in the first, middle and last layer only. It takes width³ operations."""

GPTQ_UNITS = 5
"""Time to quantize a layer, in units of the time to compute the ranks of one layer, for progress."""


def examine(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Examines the Grams of a sweep, and measures what fewer samples would have cost.

    Args:
        payload: model (its directory), grams, parts ([samples, Grams of that many samples] in rising order, the last
            one whole), heldout (Grams of another text, or None), device.
        report: where progress goes.

    Returns:
        `inputs`, one entry per distinct input of every layer, and `losses`, one per input of the layers tried.
    """
    grams = Path(payload["grams"])
    layers = len(read_index(grams)["layers"])
    tried = spread(layers) if payload["heldout"] else []
    total = layers + GPTQ_UNITS * len(tried) * len(payload["parts"])
    inputs: list[dict[str, Any]] = []
    with torch.inference_mode():
        for layer in range(layers):
            inputs += examine_layer(grams, layer, payload["device"], ranked=spread(layers))
            report(layer + 1, total, f"rank, layer {layer + 1}/{layers}")
        losses = []
        done = layers
        for layer in tried:
            weights = Checkpoint(Path(payload["model"])).tensors(anatomy.layer(layer))
            heldout = Path(payload["heldout"])
            for samples, part in payload["parts"]:
                for name, loss in layer_losses(weights, Path(part), heldout, layer, payload["device"]):
                    losses.append({"layer": layer, "input": name, "samples": samples, "loss": loss})
                done += GPTQ_UNITS
                report(done, total, f"GPTQ of layer {layer + 1} from {samples} samples")
    return {"inputs": inputs, "losses": losses, "layers_tried": tried}


def spread(layers: int) -> list[int]:
    """Returns the first, the middle and the last layer."""
    return sorted({0, layers // 2, layers - 1})


def examine_layer(folder: Path, layer: int, device: str, *, ranked: list[int]) -> list[dict[str, Any]]:
    """Returns width, tokens, dead channels and rank of every distinct input of a layer.

    The rank of an input wider than `WIDE` is None unless the layer is in `ranked`.
    """
    grams, _ = read_layer(folder, layer, device)
    found = []
    for name, gram in grams.items():
        zero, nearly = dead_channels(gram.diagonal())
        wanted = gram.width <= WIDE or layer in ranked
        found.append(
            {
                "layer": layer,
                "input": name,
                "width": gram.width,
                "tokens": gram.tokens,
                "dead": zero,
                "nearly_dead": nearly,
                "rank": rank(gram.matrix()) if wanted else None,
            }
        )
    return found


def dead_channels(diagonal: torch.Tensor) -> tuple[int, int]:
    """Returns how many channels are always zero, and how many others are below `NEARLY_DEAD` of the mean.

    Args:
        diagonal: diag(H), `[in]`.
    """
    zero = diagonal == 0
    nearly = (diagonal < NEARLY_DEAD * diagonal.mean()) & ~zero
    return int(zero.sum()), int(nearly.sum())


def rank(gram: torch.Tensor) -> int:
    """Returns the numerical rank of H, `[in, in]` float32.

    Channels differ in size by orders of magnitude, and every entry of H is exact to float32's precision of its two
    channels. So H is scaled to a diagonal of ones first. That keeps the rank and makes the error the same everywhere.
    The rank is the number of eigenvalues (float32 arithmetic) above width · eps(float32) · the largest.
    """
    size = gram.diagonal().sqrt()
    alive = size > 0
    if not alive.any():
        return 0
    size = size[alive]
    eigenvalues = torch.linalg.eigvalsh(gram[alive][:, alive] / size[:, None] / size)
    limit = gram.shape[0] * torch.finfo(torch.float32).eps * eigenvalues[-1]
    return int((eigenvalues > limit).sum())


def layer_losses(
    weights: dict[str, torch.Tensor], part: Path, heldout: Path, layer: int, device: str
) -> Iterator[tuple[str, float | None]]:
    """Yields, for every distinct input, the loss of 4-bit GPTQ on another text when it has seen only a part.

    The loss is the share of the output's energy, tr(ΔW H ΔWᵀ) / tr(W H Wᵀ). H is that of the other text, because a text
    does not judge itself. The loss is None if the part's Gram cannot be factorised.
    """
    seen, read_by = read_layer(part, layer, device)
    unseen, _ = read_layer(heldout, layer, device)
    for name, gram in seen.items():
        before = torch.cat([weights[f"{linear}.weight"] for linear, read in read_by.items() if read == name]).to(device)
        try:
            after = gptq_4(before, gram.matrix())
        except ArithmeticError:
            yield name, None
            continue
        yield name, relative_error(before, after, unseen[name].matrix())


def gptq_4(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Returns a weight, `[out, in]`, after GPTQ to 4 bits by the step's defaults, in groups of 64 where they fit."""
    step = Gptq.model_validate({})
    group_size = next((size for size in (64, 32) if weight.shape[1] % size == 0), -1)
    return gptq(
        weight,
        gram,
        bits=4,
        group_size=group_size,
        sym=step.sym,
        desc_act=step.order,
        damp_percent=step.damp_percent,
    ).weight()
