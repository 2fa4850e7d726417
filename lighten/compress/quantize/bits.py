"""Bits where they matter: the cost of each width for every linear, and the choice that a budget allows."""

from __future__ import annotations

from typing import Any

import torch

from lighten.compress.patterns import ignored
from lighten.compress.quantize.grid import dequantize, quantize, search
from lighten.compress.quantize.methods.gptq import Gptq
from lighten.compress.quantize.quantized_layers import UNTOUCHED, Layers
from lighten.errors import RequestError
from lighten.model.anatomy import HEAD_WEIGHT
from lighten.model.sensitivity import Sensitivity
from lighten.numerics.damping import inverse_factor
from lighten.numerics.knapsack import Option, choose
from lighten.process.workers import ordered
from lighten.step import Context

WIDTHS = (2, 3, 4, 8)
SHAPE_BYTES = 16
"""Bytes of the `weight_shape` beside packed weights. The options leave it out, so that their sizes share a divisor."""


def losses(weight: torch.Tensor, gram: torch.Tensor, step: Gptq, kind: torch.dtype) -> dict[int, torch.Tensor]:
    """Returns what GPTQ at each width would lose of every output, `[out]`, without running it.

    GPTQ's error is the sum of e² / U[j,j]² over the columns. e is a rounding error on a grid that depends little on
    what earlier columns passed on. So the unchanged weights give it closely.
    """
    gram = gram.clone()
    gram.diagonal()[gram.diagonal() == 0] = 1.0
    factor, _ = inverse_factor(gram, step.damp_percent)
    cost = factor.diagonal().pow(-2)
    width = len(gram)
    size = width if step.group_size == -1 else step.group_size
    w = weight.t().float().reshape(-1, size, len(weight))
    cost = cost.reshape(-1, size)
    found = {}
    for bits in WIDTHS:
        scale, zero = (each.unsqueeze(-2) for each in search(w, bits, step.symmetry, cost.square(), kind))
        error = (dequantize(quantize(w, scale, zero, bits), scale, zero) - w).square_()
        found[bits] = (error * cost[..., None]).sum((0, 1))
    return found


def price(
    step: Gptq, layers: Layers, sensitivity: Sensitivity, index: int
) -> list[tuple[str, int, list[int], list[float]]]:
    """Returns name, weights, and the bytes and cost of every option of the linears of a layer that may be quantized.

    Raises:
        RequestError: a Gram cannot be factorised.
    """
    kind = layers.scale_type()
    prefix, tensors, inputs = layers.read(index)
    found = []
    for group in inputs:
        members = [
            name
            for name in group.linears
            if not ignored(prefix + name, step.ignore) and prefix + name not in layers.left
        ]
        if not members:
            continue
        parts = [tensors[f"{name}.weight"] for name in members]
        try:
            with torch.inference_mode():
                lost = losses(torch.cat(parts), group.gram.matrix(), step, kind)
        except ArithmeticError as error:
            raise RequestError(
                f"a budget needs the Gram of {prefix}{group.first}, which is {error}; give it more text"
            ) from error
        start = 0
        for name, part in zip(members, parts, strict=True):
            rows = slice(start, start := start + len(part))
            worth = sensitivity.outputs.get(prefix + name)
            if worth is None:
                raise RequestError(
                    f"a budget needs to know how the loss depends on {prefix}{name}, a matrix of an expert: give "
                    "bits instead, or ignore the experts"
                )
            sizes = [*(stored_bytes(part.shape, bits, step, kind) for bits in WIDTHS), part.nbytes]
            costs = [*(float(lost[bits][rows].sum()) * worth for bits in WIDTHS), 0.0]
            found.append((prefix + name, part.numel(), sizes, costs))
    return found


def allocate(step: Gptq, layers: Layers, workers: int, context: Context) -> tuple[dict[str, int], dict[str, Any]]:
    """Returns the bits of every linear (16: left alone), and the facts of the choice.

    Raises:
        RequestError: the budget is below the smallest size that can be reached.
    """
    count = len(layers)
    assert step.budget and context.sensitivity
    sensitivity = Sensitivity.read(context.sensitivity)

    def report(done: int) -> None:
        context.report(done, 2 * count, f"what each width costs, layer {done}/{count}")

    priced = ordered(lambda index: price(step, layers, sensitivity, index), count, workers, report)
    linears = [linear for layer in priced for linear in layer]
    names, sizes = [linear[0] for linear in linears], [linear[1] for linear in linears]
    options = [[Option(*option) for option in zip(*linear[2:], strict=True)] for linear in linears]
    weights = sum(sizes)
    capacity = round(step.budget.bits * weights / 8) if step.budget.bits else (step.budget.size or 0)
    fixed = 0 if step.budget.bits else other_bytes(layers, names)
    choice = choose(options, capacity, fixed)
    widths = [(*WIDTHS, UNTOUCHED)[index] for index in choice.indices]
    taken = [option[index].size for option, index in zip(options, choice.indices, strict=True)]
    chosen = dict(zip(names, widths, strict=True))
    allocation = {
        name: {"type": f"{bits} bits" if bits != UNTOUCHED else "untouched", "bits": 8 * size / numel}
        for (name, bits), size, numel in zip(chosen.items(), taken, sizes, strict=True)
    }
    facts = {
        "allocation": allocation,
        "budget": step.budget.model_dump(exclude_none=True),
        "bits_per_linear_weight": 8 * sum(taken) / weights,
        "exact_allocation": choice.exact,
    }
    return chosen, facts


def stored_bytes(shape: torch.Size, bits: int, step: Gptq, kind: torch.dtype) -> int:
    """Returns the bytes of a linear in the `pack-quantized` format: codes, zero points, and scales of type `kind`."""
    outputs, width = shape
    groups = 1 if step.group_size == -1 else width // step.group_size
    words = outputs * -(-width * bits // 32)
    zeros = 0 if step.sym else groups * -(-outputs * bits // 32)
    return 4 * (words + zeros) + kind.itemsize * groups * outputs


def other_bytes(layers: Layers, names: list[str]) -> int:
    """Returns the bytes of the artifact beside those linears: other tensors, the header, and the files copied along."""
    checkpoint = layers.checkpoint
    chosen = {f"{name}.weight" for name in names}
    tensors = sum(checkpoint.tensor(name).nbytes for name in checkpoint.weight_map if name not in chosen)
    if layers.step.quantizes_head:
        tensors += sum(tensor.nbytes for tensor in layers.head().values()) - checkpoint.tensor(HEAD_WEIGHT).nbytes
    files = sum(
        file.stat().st_size for file in checkpoint.path.iterdir() if file.is_file() and file.suffix != ".safetensors"
    )
    return tensors + files + 1024 + 160 * 6 * len(checkpoint.weight_map) + (60 + SHAPE_BYTES) * len(names)
