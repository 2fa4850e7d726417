"""A GGUF file of a given size: the ggml type of every matrix.

Every candidate type of every matrix is tried. ggml rounds the matrix. The error of the outputs, tr(ΔW H ΔWᵀ) with the
Gram matrix H of the inputs, is computed from the result, and multiplied by what such an error costs the loss. Then the
types are chosen together, by the exact solution of the knapsack problem.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError
from lighten.export.gguf import ggml
from lighten.export.gguf.linears import Matrices, in_order, matrices
from lighten.export.gguf.quantize import Importance
from lighten.export.gguf.write import Draft, tensor_bytes
from lighten.model import anatomy
from lighten.numerics.knapsack import Choice, Option, choose
from lighten.step import Report, silent

if TYPE_CHECKING:
    import torch

    from lighten.model.sensitivity import Sensitivity

WIDE = ("Q2_K", "Q3_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")
"""Candidates for rows that are a multiple of 256."""
NARROW = ("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "F16")
"""Candidates for rows that are a multiple of 32 only."""

MOST_ROWS = 2048
"""Maximum number of rows of a matrix that are tried, evenly spread. Only an embedding or a head has many more."""
LEAST_ROWS = 64
"""Number of rows of every expert that are tried at least. All experts of a tensor share `MOST_ROWS`."""
_SLICE = 1 << 18
"""Number of weights that one thread rounds at a time. It is fixed, so sums do not depend on the number of cores."""
_ALIGNMENT = 32
"""Number of bytes: GGUF pads every tensor to a multiple of it."""


@dataclass(frozen=True)
class Prices:
    """The prices of errors: the place of the sweep's Grams, and how much the loss depends on every output."""

    grams: Path
    sensitivity: Sensitivity


Costs = dict[str, dict[str, float]]
"""Rise of the loss of a token, to second order, by Hugging Face name and type of a matrix."""


def candidates(width: int) -> tuple[str, ...]:
    """Returns the types that rows of `width` can have."""
    return WIDE if width % 256 == 0 else NARROW if width % 32 == 0 else ("F16",)


def fixed_type(shape: tuple[int, ...]) -> str:
    """Returns the type of a matrix whose errors have no price: one that loses next to nothing."""
    return "Q8_0" if shape[-1] % 32 == 0 else "F16"


def try_types(draft: Draft, prices: Prices, weights: Importance, report: Report = silent) -> Costs:
    """Returns the cost of every type of every matrix, in the order of the file.

    The experts of a layer are one tensor of the file, and have one type: its cost is the sum of theirs.
    """
    names = matrices(draft)
    costs: Costs = {}
    whole: torch.Tensor | None = None
    with _workers() as pool:
        for hf, expert, metric in _metrics(draft, prices):
            if hf not in costs:
                report(len(costs), len(names), hf)
                whole = None if draft.pieces[hf].place.of_experts or expert is None else draft.weight(hf)
            weight = draft.weight(hf, expert) if whole is None else whole[expert]
            if not isinstance(metric, float):
                metric = in_order(draft, hf, metric)
            channels, most = importance_of(draft, hf, weights), MOST_ROWS
            if expert is not None:
                experts = draft.shapes[hf][0]
                channels = of_expert(channels, expert, weight.shape[-1])
                most = max(MOST_ROWS // experts, LEAST_ROWS)
            found = _try_matrix(weight, metric, channels, pool, most)
            known = costs.setdefault(hf, dict.fromkeys(found, 0.0))
            costs[hf] = {type: known[type] + cost for type, cost in found.items()}
    return {hf: costs.get(hf) or {fixed_type(draft.shapes[hf]): 0.0} for hf in names}


def importance_of(draft: Draft, hf: str, weights: Importance) -> Any:
    """Returns the importance of a matrix's input channels; all equal if it was not measured.

    It is `[in]`. For a tensor of all experts it is `[experts · in]` where it was measured.
    """
    import numpy as np

    return weights.get(draft.names[hf], np.ones(draft.shapes[hf][-1], dtype=np.float32))


def of_expert(channels: Any, expert: int, width: int) -> Any:
    """Returns the importance `[in]` of the channels of one expert."""
    return channels if len(channels) == width else channels[expert * width : (expert + 1) * width]


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Yields one thread per core. Meanwhile torch uses only the thread that calls it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _metrics(draft: Draft, prices: Prices) -> Iterator[tuple[str, int | None, torch.Tensor | float]]:
    """Yields every matrix, its expert, and M such that an error ΔW costs tr(ΔW M ΔWᵀ): `[in, in]`, or a number times 1.

    For a linear M is the mean of x xᵀ of its inputs times the mean squared derivative of the loss by its outputs. An
    embedding hands its rows on as they are, each as often as its token occurs: on average every one of them once in
    as many tokens as there are. The inputs of an expert count as often as the router sends a token to it.
    """
    import torch

    from lighten.model.grams import prefix_of, read_index, read_layer

    known = prices.sensitivity
    head = known.head_gram / known.tokens * known.outputs[anatomy.HEAD]
    rows = known.outputs[anatomy.EMBEDDING] / len(known.counts)
    if draft.family.head_weight in draft.names:
        yield draft.family.head_weight, None, head
        yield draft.family.embedding, None, rows
    else:
        yield draft.family.embedding, None, head + rows * torch.eye(len(head))
    index = read_index(prices.grams)
    text = max(tokens for layer in index["layers"] for tokens in layer["tokens"].values())
    matrix = Matrices(draft).of
    for layer in range(len(index["layers"])):
        found, inputs = read_layer(prices.grams, layer)
        readers: dict[str, list[tuple[int | None, str, str]]] = {}
        for linear, name in inputs.items():
            module = prefix_of(index, layer) + linear
            for label, expert in matrix(f"{module}.weight") if module in known.outputs else ():
                readers.setdefault(label, []).append((expert, module, name))
        for label, each in readers.items():
            for expert, module, name in each:
                gram = found[name]
                mean = without_leading(gram.matrix() / (max(gram.tokens, 1) if expert is None else text))
                yield label, expert, mean * known.outputs[module]


def without_leading(gram: torch.Tensor) -> torch.Tensor:
    """Returns a Gram matrix `[in, in]` without the direction of its largest eigenvalue.

    In some layers that direction is the massive activations of one token in hundreds (Sun et al., 2024), a thousand
    times the rest, and one price for all tokens does not fit them. That this helps was seen on one model.
    """
    import torch

    # the power method; the gap is wide where it matters
    direction = gram.diagonal().sqrt()
    for _ in range(30):
        direction = torch.nn.functional.normalize(gram @ direction, dim=0)
    image = gram @ direction
    return gram - torch.outer(image, direction) if image.isfinite().all() else gram


def _try_matrix(
    weight: torch.Tensor, metric: torch.Tensor | float, channels: Any, pool: ThreadPoolExecutor, most: int
) -> dict[str, float]:
    rows, width = weight.shape
    sample = weight[:: -(-rows // most) | 1].float()  # odd, for rotated rows lie in pairs
    step = max(1, _SLICE // width)
    slices = [sample[start : start + step] for start in range(0, len(sample), step)]

    def cost(job: tuple[str, torch.Tensor]) -> float:
        import torch

        type, part = job
        change = torch.from_numpy(ggml.dequantize(ggml.quantize(part.numpy(), type, channels), type, width)) - part
        product = change * metric if isinstance(metric, float) else change @ metric
        return float(torch.sum(product * change, dtype=torch.float64))

    types = candidates(width)
    found = list(pool.map(cost, [(type, part) for type in types for part in slices]))
    by_type = [found[n * len(slices) : (n + 1) * len(slices)] for n in range(len(types))]
    return {type: math.fsum(parts) * rows / len(sample) for type, parts in zip(types, by_type, strict=True)}


def padded_bytes(shape: tuple[int, ...], type: str) -> int:
    """Returns the bytes that a tensor takes in a file."""
    return -(-tensor_bytes(shape, type) // _ALIGNMENT) * _ALIGNMENT


def fixed_bytes(draft: Draft, scratch: Path) -> int:
    """Returns the bytes of a file before its first weight, which are the metadata; `scratch` is a name for a trial."""
    writer = draft.begin(scratch, draft.types("F16"), None)
    try:
        size: int = writer.fout[0].tell()
    finally:
        writer.close()
        scratch.unlink()
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pick(draft: Draft, costs: Costs, capacity: int, fixed: int) -> tuple[dict[str, str], Choice]:
    """Returns the type of every tensor, by Hugging Face name, and facts about the choice.

    Args:
        draft: the model.
        costs: of `try_types`.
        capacity: bytes of the whole file.
        fixed: bytes among them that are not matrices.
    """
    options = [
        [Option(padded_bytes(draft.shapes[hf], type), cost) for type, cost in types.items()]
        for hf, types in costs.items()
    ]
    choice = choose(options, capacity, fixed)
    taken = {hf: list(types)[index] for (hf, types), index in zip(costs.items(), choice.indices, strict=True)}
    return draft.types("F32") | taken, choice


def save(draft: Draft, file: Path, types: dict[str, str], weights: Importance, report: Report = silent) -> None:
    """Writes the file with the type given for every tensor."""
    with _workers() as pool:

        def encode(hf: str, weight: torch.Tensor, type: str) -> Any:
            import numpy as np

            width = weight.shape[-1]
            channels, step = importance_of(draft, hf, weights), max(1, _SLICE // width)
            stacked = weight.reshape(-1, *weight.shape[-2:])
            parts = [
                (rows[start : start + step], of_expert(channels, expert, width))
                for expert, rows in enumerate(stacked)
                for start in range(0, len(rows), step)
            ]
            packed = pool.map(lambda part: ggml.quantize(part[0].float().numpy(), type, part[1]), parts)
            return np.concatenate(list(packed))

        draft.save(file, types, report, encode)


def fit(
    draft: Draft,
    file: Path,
    size: int | None,
    bits: float | None,
    prices: Prices,
    weights: Importance,
    report: Report = silent,
) -> dict[str, Any]:
    """Writes a model as a GGUF file within a budget, with the types that cost least.

    Args:
        draft: the model.
        file: the file to write.
        size: bytes of the whole file, or None for a budget of bits.
        bits: per weight, on average over all tensors.
        prices: what errors cost.
        weights: its importance matrix.
        report: called for every tried matrix and every written tensor.

    Returns:
        The facts: `allocation`, the type and bits per weight by module; `budget_bytes` of the whole file; and
        `predicted_error`, what the file should add to the loss of a token, in nats.

    Raises:
        RequestError: no choice of types is small enough.
    """
    fixed = fixed_bytes(draft, file.with_name(f".{file.name}.scratch"))
    capacity = size if size is not None else _capacity(draft, fixed, bits or 0.0)
    vectors = sum(padded_bytes(draft.shapes[hf], "F32") for hf, piece in draft.pieces.items() if not piece.is_matrix)
    _check_reachable(draft, capacity, fixed + vectors, fixed)
    names = matrices(draft)
    steps = len(names) + len(draft.names)
    costs = try_types(draft, prices, weights, lambda done, _, note: report(done, steps, f"trying types of {note}"))
    types, choice = pick(draft, costs, capacity, fixed + vectors)
    save(draft, file, types, weights, lambda done, _, note: report(len(names) + done, steps, f"writing {note}"))
    if (written := file.stat().st_size) > capacity:
        raise Failure(f"{file.name} came to {written:,} bytes, over the budget of {capacity:,}: please report this")
    allocation = {
        hf.removesuffix(".weight"): {
            "type": types[hf],
            "bits": round(8 * tensor_bytes(draft.shapes[hf], types[hf]) / math.prod(draft.shapes[hf]), 4),
        }
        for hf in names
    }
    return {"allocation": allocation, "budget_bytes": capacity, "predicted_error": float(f"{choice.cost / 2:.6g}")}


def _capacity(draft: Draft, fixed: int, bits: float) -> int:
    """Returns the bytes of a file whose tensors have `bits` per weight on average."""
    return fixed + math.floor(bits * sum(math.prod(draft.shapes[hf]) for hf in draft.names) / 8)


def _check_reachable(draft: Draft, capacity: int, fixed: int, metadata: int) -> None:
    """Raises RequestError for a budget below the smallest types of all matrices, before any is tried."""
    shapes = [draft.shapes[hf] for hf in matrices(draft)]
    smallest = fixed + sum(min(padded_bytes(shape, type) for type in candidates(shape[-1])) for shape in shapes)
    if smallest > capacity:
        weights = sum(math.prod(draft.shapes[hf]) for hf in draft.names)
        bits = math.ceil(800 * (smallest - metadata) / weights) / 100
        raise RequestError(
            f"a budget of {capacity:,} bytes is too small: the smallest file of this model has {smallest:,} bytes, "
            f"which is {bits:.2f} bits per weight; set size={math.ceil(smallest / 1e5) / 10:.1f}MB or more"
        )
