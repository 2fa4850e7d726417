"""Gram matrices, accumulated so exactly that a Cholesky factorisation of the sum succeeds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from lighten.model.grams import Gram
from lighten.model.products import exact_products

AT_ONCE = 512
"""Number of tokens whose products a processor sums at once. In float32 they fit into its caches."""


def accumulate(gram: Gram, inputs: torch.Tensor) -> None:
    """Adds XᵀX of a batch of inputs, `[…, in]`, to a Gram: half the products, summed in float32."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    with exact_products(rows.dtype):
        for part in torch.split(rows, AT_ONCE if rows.device.type == "cpu" else max(1, len(rows))):
            wide = part.float()
            for start, block in gram.rows():
                block.addmm_(wide[:, start : start + block.shape[0]].t(), wide[:, start:])
    for end in (rows.amin(0), rows.amax(0)):  # a copy with all absolute values is not made
        torch.maximum(gram.absmax, end.abs().float(), out=gram.absmax)
    gram.tokens += rows.shape[0]


class Readers:
    """Which linears of a layer read the very same tensor (q, k and v; gate and up), by the first of them."""

    def __init__(self) -> None:
        self.read_by: dict[str, str] = {}
        self._batch: dict[int, tuple[str, weakref.ref[torch.Tensor]]] = {}

    def collect(self, linear: str, inputs: torch.Tensor) -> bool:
        """Takes the inputs of one linear for the current batch; returns whether it is the first that reads them."""
        first, seen = self._batch.get(id(inputs), (linear, None))
        if seen is None or seen() is not inputs:  # a freed one's id could come back
            first = linear
            self._batch[id(inputs)] = linear, weakref.ref(inputs)
        self.read_by[linear] = first
        return first == linear

    def hook(self, linear: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        """Returns a forward pre-hook that collects the inputs of a linear."""

        def collect(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            self.collect(linear, arguments[0])

        return collect

    def end_batch(self) -> None:
        """Forgets the tensors of the batch."""
        self._batch.clear()


class LayerInputs(Readers):
    """The Grams of one layer's distinct inputs, and which linear reads which.

    Linears that get the very same tensor share one Gram, which is named after the first of them.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.grams: dict[str, Gram] = {}
        self._device = device

    def collect(self, linear: str, inputs: torch.Tensor) -> bool:
        """Takes the inputs of one linear for the current batch; returns whether it is the first that reads them."""
        first = super().collect(linear, inputs)
        if first:
            gram = self.grams.setdefault(linear, Gram.empty(inputs.shape[-1], self._device))
            accumulate(gram, inputs)
        return first
