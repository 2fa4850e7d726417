"""Quantizing against what really arrives: the model with its quantized layers runs beside the model without them.

Linears are rounded in the order of the forward. Both models are halted before each linear, so what it reads already
bears the errors of the linears before it in the same layer. `propagation` has what a linear is rounded to.

Both models are halted before a module of experts too. An expert of the quantized model gets the tokens that its own
router sends; the weight to round to is the one that gives what the source's expert would make of the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lighten.compress.calibrate.experts import Expert, ExpertInputs, Spread, draw, experts_of
from lighten.compress.calibrate.gram import accumulate
from lighten.compress.quantize.propagation import Both, corrected
from lighten.compress.quantize.quantized_layers import Inputs, Layers, Work
from lighten.model.blockwise import BlockwiseModel
from lighten.model.discovery import Linear, is_turned
from lighten.model.experts import given_to, inner, routed
from lighten.model.grams import ExpertTokens, Gram
from lighten.model.suspension import Call, Place, Turn, turns
from lighten.step import Context


@dataclass
class Streams:
    """The two models, and the layers of the quantized one as they are made."""

    layers: Layers
    model: BlockwiseModel
    alphas: list[float] = field(default_factory=list)
    """α of every input."""
    alone: int = 0
    """Number of linears for which earlier errors are not made good, such as those of experts with few tokens."""
    tokens: list[tuple[int, int]] = field(default_factory=list)
    """The number of tokens of every expert, and the width of its inputs."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the manifest."""
        mean = sum(self.alphas) / max(1, len(self.alphas))
        return {"propagation": {"inputs": len(self.alphas), "alpha": round(mean, 4), "linears_without": self.alone}}

    @property
    def experts(self) -> ExpertTokens | None:
        """Numbers of tokens that experts of the quantized model saw; None if it has none."""
        return ExpertTokens.of(self.tokens)

    def walk(
        self, ids: torch.Tensor, targets: torch.Tensor | None, context: Context
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Quantizes layer after layer in the order of the forward; yields its number and what was written.

        Args:
            ids: `[samples, length]`, the calibration set.
            targets: what the decoder of a sequence-to-sequence model reads, `[samples, length]`; None for `ids`.
            context: of the step.
        """
        batches = self.model.batches(ids)
        count = len(self.layers)
        twice = None if targets is None else torch.cat([targets, targets])
        turns_of_layers = self.model.turns(torch.cat([ids, ids]), batches=(*batches, *batches), targets=twice)
        for done, (index, block, turn) in enumerate(turns_of_layers):
            with self.layers.started(index) as work:
                _Block(self, work, block, turn).run()
                answer = work.finish()
            context.report(done + 1, count, f"layer {done + 1}/{count}")
            yield index, answer

    def round(self, work: Work, group: Inputs, sums: Both, drawn: Gram | None = None) -> dict[str, torch.Tensor]:
        """Rounds and stores linears that read one input. Returns the weights that they stand for, by name in the layer.

        Args:
            work: the layer.
            group: the linears.
            sums: over what they read in both models.
            drawn: second moments to round by, if the tokens are too few to make earlier errors good.
        """
        sums.close()
        weights = {name: work.tensors[f"{name}.weight"] for name in group.linears}
        together = torch.cat(list(weights.values()))
        target, alpha = together.float(), 0.0
        if drawn is None:
            try:
                target, alpha = corrected(together, sums.known.read.matrix(), sums.known.moved, sums.held)
            except ArithmeticError as error:
                reader = work.prefix + group.first
                work.findings.warnings.append(f"{reader}: earlier errors are not made good, for its Gram is {error}")
            self.alphas.append(alpha)
        else:
            self.alone += len(weights)
        gram = (sums.together() if drawn is None else drawn).matrix()
        wanted = dict(zip(weights, torch.split(target, [len(each) for each in weights.values()]), strict=True))
        del sums, drawn, together
        found: dict[str, torch.Tensor] = {}
        for linears in work.linears_of(group, gram, wanted):
            found |= work.store(linears, self.layers.rounds(self.layers.step, linears))
        return {name: each.to(self.model.dtype) for name, each in found.items()}


class _Block:
    """A block that both models run, linear by linear. Each is rounded before the quantized model calls it."""

    def __init__(self, streams: Streams, work: Work, block: nn.Module, turn: Turn) -> None:
        self.streams, self.work, self.block, self.turn = streams, work, block, turn
        self.half = len(turn.calls) // 2
        """The number of batches: of the source first, then of the quantized model."""
        self.device = streams.layers.device
        layer = streams.layers.anatomy.layers[work.index]
        self.linears = {each.module: each for each in layer.linears if each.inside is None}
        self.stacks = {each.name: each for each in experts_of(layer, block, self.device)}
        self.waiting = {name: group for group in work.inputs for name in group.linears}
        """The linears that were not rounded yet."""
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        """Rounded parameters by the module's name."""

    def run(self) -> None:
        """Runs the block for all batches."""
        modules = {name: self.block.get_submodule(name) for name in (*self.linears, *self.stacks)}
        at_once = torch.get_num_threads() if self.turn.place.device == "cpu" else 1
        halts = turns(
            lambda number: self.turn.answer(self.turn.calls[number]),
            len(self.turn.calls),
            modules,
            place=self.turn.place,
            at_once=at_once,
        )
        for halted in halts:
            module = modules[halted.name]
            if pairs := self._pairs(halted):
                if halted.name in self.stacks and halted.name not in self.weights:
                    self.weights[halted.name] = self._round_experts(self.stacks[halted.name], pairs)
                elif halted.name in self.linears and (group := self.waiting.get(self.linears[halted.name].name)):
                    self._round_linears(group, pairs)
            for start in range(0, len(halted.calls), at_once):
                part = halted.calls[start : start + at_once]
                for call in part:
                    own = self.weights.get(halted.name, {}) if call.batch >= self.half else {}
                    with _parameters(module, own):
                        halted.answer(call)
                halted.go_on(*part)  # what it read and gave is not held beside what others get

    def _pairs(self, halted: Turn) -> list[tuple[Call, Call]]:
        """Returns the calls of each batch in the source and in the quantized model."""
        by = {call.batch: call for call in halted.calls}
        return [(by.get(each - self.half, call), call) for each, call in by.items() if each >= self.half]

    def _take(self, group: Inputs) -> None:
        self.waiting = {name: each for name, each in self.waiting.items() if each is not group}

    def _round_linears(self, group: Inputs, pairs: list[tuple[Call, Call]]) -> None:
        """Rounds the linears that read the input before which both models are halted."""
        width = self.work.tensors[f"{group.first}.weight"].shape[1]
        sums = Both.empty(width, self.device)
        for calls in pairs:
            sums.add(*(_input(each, self.turn.place).reshape(-1, width) for each in calls))
        rounded = self.streams.round(self.work, group, sums)
        self._take(group)
        for path, linear in self.linears.items():
            if linear.name in rounded:
                weight = rounded[linear.name]
                turned = is_turned(self.block.get_submodule(path))
                self.weights[path] = {"weight": weight.t().contiguous() if turned else weight}

    def _round_experts(self, stack: ExpertInputs, pairs: list[tuple[Call, Call]]) -> dict[str, torch.Tensor]:
        """Rounds the experts before whose module both models are halted; returns the module's parameters."""
        module = stack.module
        found: dict[str, torch.Tensor] = {}
        for expert in stack.experts:
            for linear in (*expert.first, *expert.last):
                assert linear.inside is not None
                found.setdefault(linear.inside.tensor, module.get_parameter(linear.inside.tensor).clone())
        calls = [[_routed(module, call, self.turn.place) for call in pair] for pair in pairs]
        spread = Spread([quantized for _, quantized in calls])
        for expert in stack.experts:
            rows = [_given(expert.number, *pair) for pair in calls]
            self.streams.tokens.append((sum(len(each[1]) for each in rows), (expert.first or expert.last)[0].shape[1]))
            for readers in filter(None, (expert.first, expert.last)):
                group = self.waiting[readers[0].name]
                sums, drawn = self._sums_of(expert, readers, stack, found, rows, spread)
                for name, weight in self.streams.round(self.work, group, sums, drawn).items():
                    spot = next(each.inside for each in readers if each.name == name)
                    assert spot is not None
                    spot.of(found[spot.tensor]).copy_(weight)
                self._take(group)
        return found

    def _sums_of(
        self,
        expert: Expert,
        readers: list[Linear],
        stack: ExpertInputs,
        rounded: Mapping[str, torch.Tensor],
        rows: list[tuple[torch.Tensor, torch.Tensor]],
        spread: Spread,
    ) -> tuple[Both, Gram | None]:
        """Returns the sums over the inputs of an expert's linears, and their Gram if their tokens are too few."""
        module, last = stack.module, readers is expert.last

        def read(states: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
            with _parameters(module, parameters):
                return inner(module, expert.number, states) if last else states

        width = readers[0].shape[1]
        sums, tokens = Both.empty(width, self.device), 0
        for plain, quantized in rows:
            if len(quantized):
                sums.add(read(plain, {}), read(quantized, rounded))
            tokens += len(quantized)
        if tokens >= width:
            return sums, None
        drawn, other = sums.together(), Gram.empty(width, self.device)
        accumulate(other, read(spread.of(width), rounded))
        draw(drawn, other)
        return sums, drawn


@contextmanager
def _parameters(module: nn.Module, others: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives a module other parameters for a while."""
    own = {name: module._parameters[name] for name in others}
    for name, each in others.items():
        module._parameters[name] = nn.Parameter(each, requires_grad=False)
    yield
    module._parameters.update(own)


def _input(call: Call, place: Place) -> torch.Tensor:
    """Returns what a linear is called with."""
    found: torch.Tensor = place.fetch(call.args[0] if call.args else next(iter(call.kwargs.values())))
    return found


def _routed(module: nn.Module, call: Call, place: Place) -> tuple[torch.Tensor, Any]:
    """Returns the states that a module of experts is called with, and which expert gets which."""
    args, kwargs = place.fetch((call.args, call.kwargs))
    return routed(module, args, kwargs)[0]


def _given(
    expert: int, plain: tuple[torch.Tensor, Any], quantized: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the states that an expert of the quantized model gets, `[tokens, in]`, in the source and in it.

    Where each expert has states of its own, the source has none of a token that it sends elsewhere: those count as
    unchanged.
    """
    states, chosen = quantized
    own = given_to(expert, states, chosen)
    if chosen is None:
        return own, own
    return plain[0][(chosen == expert).any(-1)], own
