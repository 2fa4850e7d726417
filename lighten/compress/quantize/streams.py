"""Quantizing against what really arrives: the model with its quantized layers runs beside the model without them.

A layer of the quantized model reads inputs X̂ that earlier rounding has changed, while its outputs should still be those
of the source, which reads X. Its best unrounded weight is therefore not W but the one whose outputs on X̂ come closest
to WXᵀ. Per token, with Ĥ = X̂ᵀX̂ and D = (X − X̂)ᵀX̂, that is W + WDĤ⁻¹ (Arai and Ichikawa, "Quantization Error
Propagation", 2025; Li et al., "GPTAQ", 2025). How far to go, α between 0 and 1, is what is best on tokens that the sum
does not hold. Rounding then counts its errors on Ĥ.

Linears are rounded in the order of the forward. Both models are halted before each linear, so what it reads already
bears the errors of the linears before it in the same layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lighten.compress.calibrate.gram import accumulate
from lighten.compress.damping import damped
from lighten.compress.quantize.linears import Linears
from lighten.compress.quantize.quantized_layers import Inputs, Layers, Work
from lighten.model.blockwise import BlockwiseModel
from lighten.model.discovery import is_turned
from lighten.model.grams import Gram
from lighten.model.products import exact_products
from lighten.model.suspension import Call, Place, Turn, turns
from lighten.step import Context

HELD_OUT = 8
"""One token of so many is left out of the sums that the change of the weights is made from, to choose its size."""
RIDGE = 0.01
"""Share of the mean of diag(Ĥ) that is added to it where the change of the weights is solved for."""


@dataclass
class Sums:
    """Sums over tokens of what a linear reads in both models."""

    read: Gram
    """Ĥ = X̂ᵀX̂."""
    moved: torch.Tensor
    """D = (X − X̂)ᵀX̂, `[in, in]`."""

    @staticmethod
    def empty(width: int, device: str) -> Sums:
        """Returns the sums of no tokens."""
        return Sums(Gram.empty(width, device), torch.zeros(width, width, device=device))

    def add(self, plain: torch.Tensor, quantized: torch.Tensor) -> None:
        """Adds the inputs of some tokens, `[tokens, in]`, of the source and of the quantized model."""
        accumulate(self.read, quantized)
        # the difference is small, so that its own rounding is of no weight, while that of XᵀX̂ − Ĥ would be
        change = (plain.float() - quantized.float()).to(quantized.dtype)
        with exact_products(torch.bfloat16):
            self.moved.add_((change.t() @ quantized).float())


def corrected(weight: torch.Tensor, gram: torch.Tensor, known: torch.Tensor, held: Sums) -> tuple[torch.Tensor, float]:
    """Returns the weight whose outputs on changed inputs come near to those of `weight` on the inputs of the source.

    Args:
        weight: `[out, in]`, of all linears that read the input.
        gram: Ĥ of the tokens of `known`, `[in, in]`.
        known: D of the tokens that the change is made from, `[in, in]`.
        held: sums of other tokens, on which α is chosen.

    Returns:
        The weight, float32, and α.

    Raises:
        ArithmeticError: Ĥ is not positive definite.
    """
    wide = weight.float()
    lower, failed = torch.linalg.cholesky_ex(damped(gram, RIDGE))
    if failed:
        raise ArithmeticError(f"not positive definite even with {RIDGE:g} of its mean diagonal added")
    change = torch.cholesky_solve((wide @ known).t(), lower).t()
    gain = float((change * (wide @ held.moved)).sum())
    cost = float(((change @ held.read.matrix()) * change).sum())
    alpha = min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
    return wide + alpha * change, alpha


@dataclass
class Streams:
    """The two models, and the layers of the quantized one as they are made."""

    layers: Layers
    model: BlockwiseModel
    alphas: list[float] = field(default_factory=list)
    """α of every input."""
    alone: int = 0
    """Number of linears, such as those of experts, that were rounded against the inputs of the source."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the manifest."""
        mean = sum(self.alphas) / max(1, len(self.alphas))
        return {"propagation": {"inputs": len(self.alphas), "alpha": round(mean, 4), "linears_without": self.alone}}

    def walk(self, ids: torch.Tensor, context: Context) -> Iterator[tuple[int, dict[str, Any]]]:
        """Quantizes layer after layer in the order of the forward; yields its number and what was written.

        Args:
            ids: `[samples, length]`, the calibration set.
            context: of the step.
        """
        batches = self.model.batches(ids)
        count = len(self.layers)
        for done, (index, block, turn) in enumerate(
            self.model.turns(torch.cat([ids, ids]), batches=(*batches, *batches))
        ):
            with self.layers.started(index) as work:
                self._run(work, block, turn)
                answer = work.finish()
            context.report(done + 1, count, f"layer {done + 1}/{count}")
            yield index, answer

    def _run(self, work: Work, block: nn.Module, turn: Turn) -> None:
        """Runs a block in both models, linear by linear, and rounds each before the quantized model calls it."""
        layer = self.layers.anatomy.layers[work.index]
        linears = {each.module: each for each in layer.linears if each.inside is None}
        waiting = {name: group for group in work.inputs for name in group.linears}
        rounded: dict[str, torch.Tensor] = {}
        modules = {name: block.get_submodule(name) for name in linears}
        halts = turns(
            lambda number: turn.answer(turn.calls[number]),
            len(turn.calls),
            modules,
            place=turn.place,
            threads=torch.get_num_threads(),
        )
        for halted in halts:
            linear = linears[halted.name]
            if group := waiting.get(linear.name):
                weights = self._round(work, group, halted)
                rounded |= {name: each.to(self.model.dtype) for name, each in weights.items()}
                waiting = {name: each for name, each in waiting.items() if each is not group}
            module, half = modules[halted.name], len(turn.calls) // 2
            for call in halted.calls:
                quantized = call.batch >= half and linear.name in rounded
                with _weight_of(module, rounded[linear.name] if quantized else None):
                    halted.answer(call)
        for group in {id(each): each for each in waiting.values()}.values():
            self.alone += len(group.linears)
            self._stored(work, work.linears_of(group))  # experts, and what this text never calls

    def _round(self, work: Work, group: Inputs, halted: Turn) -> dict[str, torch.Tensor]:
        """Rounds the linears that read the input before which both models are halted."""
        by = {call.batch: call for call in halted.calls}
        width = work.tensors[f"{group.first}.weight"].shape[1]
        known, held = (Sums.empty(width, self.layers.device) for _ in range(2))
        for number in range(half := len(halted.calls) // 2):
            rows = (_input(by[each], halted.place).reshape(-1, width) for each in (number, number + half))
            (plain, plain_out), (quantized, quantized_out) = (_parted(each) for each in rows)
            known.add(plain, quantized)
            held.add(plain_out, quantized_out)
        weights = {name: work.tensors[f"{name}.weight"] for name in group.linears}
        gram = known.read.matrix()
        together = torch.cat(list(weights.values()))
        try:
            target, alpha = corrected(together, gram, known.moved, held)
        except ArithmeticError as error:
            target, alpha = together.float(), 0.0
            reader = work.prefix + group.first
            work.findings.warnings.append(f"{reader}: earlier errors are not made good, for its Gram is {error}")
        self.alphas.append(alpha)
        gram += held.read.matrix()
        sizes = [len(weight) for weight in weights.values()]
        wanted = dict(zip(weights, torch.split(target, sizes), strict=True))
        del known, held
        return self._stored(work, work.linears_of(group, gram, wanted))

    def _stored(self, work: Work, parts: Iterator[Linears]) -> dict[str, torch.Tensor]:
        """Rounds and stores linears; returns the weights that they stand for, by name in the layer."""
        weights: dict[str, torch.Tensor] = {}
        for linears in parts:
            weights |= work.store(linears, self.layers.rounds(self.layers.step, linears))
        return weights


def _parted(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens of a batch to sum over, and its last ones, which are held out, `[tokens, in]` each."""
    out = len(rows) // HELD_OUT
    return rows[: len(rows) - out], rows[len(rows) - out :]


@contextmanager
def _weight_of(module: nn.Module, weight: torch.Tensor | None) -> Iterator[None]:
    """Gives a linear another weight `[out, in]` for a while; None leaves its own."""
    own = module._parameters["weight"]
    if weight is not None:
        as_held = weight.t().contiguous() if is_turned(module) else weight
        module._parameters["weight"] = nn.Parameter(as_held, requires_grad=False)
    yield
    module._parameters["weight"] = own


def _input(call: Call, place: Place) -> torch.Tensor:
    """Returns what a linear is called with."""
    found: torch.Tensor = place.fetch(call.args[0] if call.args else next(iter(call.kwargs.values())))
    return found
