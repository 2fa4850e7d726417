"""Weights that CTranslate2 rounds to 8 bits, rounded before it sees them so that errors make good for each other.

Its converter gives every output of a linear the scale max |w| / 127, and takes the nearest codes. Here the weights are
put on that very grid with error feedback (see `numerics/columns`), so that its converter finds the same codes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from lighten.export.ctranslate2.matrices import is_linear, matrix, place
from lighten.numerics.columns import Columns
from lighten.step import Report

SAMPLES, LENGTH = 8, 512
"""Sequences of the built-in text that are read, and tokens of each."""
DAMPING = 0.1
"""Share of the mean of diag(H) that is added to it."""
AT_ONCE = 2**31
"""Bytes of the Grams that are held together."""
MOST = 127
"""Largest code."""


@torch.no_grad()
def round_linears(model: Any, ids: torch.Tensor, report: Report) -> dict[str, int]:
    """Puts the weights of all linears of a model on the grid of the converter.

    Args:
        model: a causal model in float32. Tied weights are rounded once, for their linear.
        ids: tokens, `[samples, length]`.
        report: hears of each linear.

    Returns:
        How many were rounded with feedback, and how many were left to the nearest codes: nothing came to
        them, or their Gram could not be factorised.
    """
    linears = [each for each in model.modules() if is_linear(each)]
    total, done, fed = len(linears), 0, 0
    for some in _batches(linears):
        grams = _grams(model, ids, some)
        for linear in some:
            report(done, total, "rounding")
            gram = grams.get(linear)
            done += 1
            if gram is None or not bool(gram.diagonal().any()):
                continue
            try:
                place(linear, rounded(matrix(linear), gram))
                fed += 1
            except ArithmeticError:
                continue
    return {"linears_rounded_with_feedback": fed, "linears_rounded_to_nearest": total - fed}


def rounded(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Returns a weight `[out, in]` whose rows are whole multiples of max |row| / 127, its largest number unchanged.

    Args:
        weight: any floats.
        gram: XᵀX `[in, in]` of its inputs. Those that are always zero get the nearest codes.

    Raises:
        ArithmeticError: the Gram could not be factorised.
    """
    quiet = gram.diagonal() == 0
    if bool(quiet.any()):
        gram = gram.clone()
        gram.diagonal()[quiet] = gram.diagonal().mean()
    sizes = weight.abs()
    scales, places = sizes.amax(1) / MOST, sizes.argmax(1)
    scales = torch.where(scales == 0, 1, scales)
    columns = Columns.of(weight, gram, DAMPING)
    found = torch.empty_like(weight)

    def nearest(column: int) -> torch.Tensor:
        codes = (columns.w[column] / scales).round().clamp(-MOST, MOST)
        found[:, column] = torch.where(places == column, weight[:, column], codes * scales)
        return found[:, column]

    columns.round(nearest)
    return found


def _batches(linears: list[Any]) -> Iterator[list[Any]]:
    """Yields linears whose Grams fit into memory together."""
    some: list[Any] = []
    size = 0
    for linear in linears:
        own = 4 * matrix(linear).shape[1] ** 2
        if some and size + own > AT_ONCE:
            yield some
            some, size = [], 0
        some.append(linear)
        size += own
    if some:
        yield some


def _grams(model: Any, ids: torch.Tensor, linears: list[Any]) -> dict[Any, torch.Tensor]:
    """Returns XᵀX `[in, in]` of the inputs of linears; linears that read the same tensor share it."""
    found: dict[Any, torch.Tensor] = {}
    last: list[tuple[torch.Tensor, Any]] = []

    def hear(linear: Any, inputs: Any) -> None:
        if last and last[0][0] is inputs[0]:
            found[linear] = found[last[0][1]]
            return
        last[:] = [(inputs[0], linear)]
        rows = inputs[0].flatten(0, -2).float()
        if linear not in found:
            found[linear] = torch.zeros(rows.shape[1], rows.shape[1])
        found[linear].addmm_(rows.t(), rows)

    with ExitStack() as hooks:
        for linear in linears:
            hooks.callback(linear.register_forward_pre_hook(hear).remove)
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
            last.clear()
    return found
