"""Quantizing against what really arrives: the model with its quantized layers runs beside the model without them.

Linears are rounded in the order of the forward. Both models are halted before each linear, so what it reads already
bears the errors of the linears before it in the same layer. `correction` has what a linear is rounded to. How it is
rounded is up to whoever quantizes: `Layers`.

Both models are halted before a module of experts too. An expert of the quantized model gets the tokens that its own
router sends; the weight to round to is the one that gives what the source's expert would make of the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lighten.model.blockwise import BlockwiseModel
from lighten.model.discovery import Anatomy, Linear, is_turned
from lighten.model.experts import given_to, inner, routed
from lighten.model.grams import ExpertTokens, Gram
from lighten.model.suspension import Call, Place, Turn, turns
from lighten.observe.correction import Sums, corrected
from lighten.observe.experts import Expert, ExpertInputs, Spread, draw, experts_of
from lighten.observe.gram import accumulate
from lighten.observe.residual import added, given_back, states_of
from lighten.step import Context


@dataclass
class Inputs:
    """Linears of a layer that read the same input, and its second moments if there was a sweep."""

    first: str
    linears: list[str]
    swept: Mapping[str, Gram] | None = None
    """Second moments by the name of the input."""

    @property
    def gram(self) -> Gram:
        """The second moments of the input."""
        if self.swept is None:
            raise TypeError("this method reads Grams: its settings have to say so (swept = True)")
        return self.swept[self.first]


class Work(Protocol):
    """A layer whose linears are being rounded."""

    @property
    def index(self) -> int:
        """Number of the layer."""

    @property
    def prefix(self) -> str:
        """Beginning of the full names of its tensors."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Weights of linears `[out, in]` that were not rounded yet, and other tensors, by name in the layer."""

    @property
    def inputs(self) -> Sequence[Inputs]:
        """The linears, by what they read."""

    def round(self, group: Inputs, gram: Gram, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rounds and stores linears that read one input. Returns the weights that they stand for, by name in the layer.

        Args:
            group: the linears.
            gram: second moments of the input.
            wanted: weights `[out, in]` to come close to, float32, by name in the layer.
        """

    def warn(self, text: str) -> None:
        """Takes a warning for the person."""

    def finish(self) -> Any:
        """Stores the rest of the layer. Returns what the caller of the walk wants to know."""


class Layers(Protocol):
    """The decoder layers of a checkpoint, and the way to quantize each."""

    @property
    def anatomy(self) -> Anatomy:
        """What the layers consist of."""

    @property
    def device(self) -> str:
        """Where weights are rounded."""

    def started(self, index: int) -> AbstractContextManager[Work]:
        """Opens a layer, whose linears are then rounded group by group."""


@dataclass
class Streams:
    """The two models, and the layers of the quantized one as they are made."""

    layers: Layers
    model: BlockwiseModel
    alphas: list[float] = field(default_factory=list)
    """α of every input."""
    betas: list[float] = field(default_factory=list)
    """β of every input whose linear's outputs are added to the states of its block."""
    alone: int = 0
    """Number of linears for which earlier errors are not made good, such as those of experts with few tokens."""
    tokens: list[tuple[int, int]] = field(default_factory=list)
    """The number of tokens of every expert, and the width of its inputs."""

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the manifest."""
        told = {"inputs": len(self.alphas), "alpha": _mean(self.alphas), "linears_without": self.alone}
        return {"propagation": {**told, "added": len(self.betas), "beta": _mean(self.betas)}}

    @property
    def experts(self) -> ExpertTokens | None:
        """Numbers of tokens that experts of the quantized model saw; None if it has none."""
        return ExpertTokens.of(self.tokens)

    def walk(self, ids: torch.Tensor, targets: torch.Tensor | None, context: Context) -> Iterator[tuple[int, Any]]:
        """Quantizes layer after layer in the order of the forward; yields its number and what it is finished with.

        Args:
            ids: `[samples, length]`, the calibration set.
            targets: what the decoder of a sequence-to-sequence model reads, `[samples, length]`; None for `ids`.
            context: of the step.
        """
        count = len(self.layers.anatomy.layers)
        batches = self.model.batches(ids)
        twice = None if targets is None else torch.cat([targets, targets])
        turns_of_layers = self.model.turns(torch.cat([ids, ids]), batches=(*batches, *batches), targets=twice)
        for done, (index, block, turn) in enumerate(turns_of_layers):
            with self.layers.started(index) as work:
                _Block(self, work, block, turn).run()
                answer = work.finish()
            context.report(done + 1, count, f"layer {done + 1}/{count}")
            yield index, answer

    def round(self, work: Work, group: Inputs, sums: Sums, drawn: Gram | None = None) -> dict[str, torch.Tensor]:
        """Rounds and stores linears that read one input. Returns the weights that they stand for, by name in the layer.

        Args:
            work: the layer.
            group: the linears.
            sums: over what they read in both models.
            drawn: second moments to round by, if the tokens are too few to make earlier errors good.
        """
        weights = {name: work.tensors[f"{name}.weight"] for name in group.linears}
        together = torch.cat(list(weights.values()))
        target, shares = together.float(), [0.0]
        sums.close()
        if drawn is None and sums.held:
            try:
                target, shares = corrected(together, sums)
            except ArithmeticError as error:
                reader = work.prefix + group.first
                work.warn(f"{reader}: earlier errors are not made good, for its Gram is {error}")
            self.alphas.append(shares[0])
            self.betas += shares[1:]
        else:
            self.alone += len(weights)
        gram = sums.together() if drawn is None else drawn
        wanted = dict(zip(weights, torch.split(target, [len(each) for each in weights.values()]), strict=True))
        del sums, drawn, together
        return {name: each.to(self.model.dtype) for name, each in work.round(group, gram, wanted).items()}


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
        self.twins: dict[str, nn.Module] = {}
        """Modules of the quantized model that were rounded, by name."""
        self.added: dict[str, float] = {}
        """The modules whose outputs the block adds to its states, with the factor of each."""
        self.states: dict[int, torch.Tensor] = {}
        """What the next of these outputs is added to, by batch. They wait where the states of the model do."""

    def _watch(self, modules: Mapping[str, nn.Module]) -> None:
        """Finds what the block adds to its states."""
        first = self.turn.calls[0]
        args, kwargs = tree_map(_copy, self.turn.place.fetch((first.args, first.kwargs)))  # some blocks write into them
        self.added = added(self.turn.run, args, kwargs, modules)
        found = {call.batch: states_of(call.args, call.kwargs) for call in self.turn.calls if self.added}
        self.states = {batch: each for batch, each in found.items() if each is not None}

    def _add(self, name: str, call: Call) -> None:
        """Adds an output to the states of its batch."""
        if name in self.added and (output := given_back(call.answer)) is not None:
            states = self.states[call.batch]
            self.states[call.batch] = torch.add(states, output.reshape(states.shape), alpha=self.added[name])

    def run(self) -> None:
        """Runs the block for all batches."""
        modules = {name: self.block.get_submodule(name) for name in (*self.linears, *self.stacks)}
        self._watch(modules)
        at_once = torch.get_num_threads() if self.turn.place.device == "cpu" else 1

        def straight(name: str, batch: int) -> Callable[..., Any] | None:
            """Returns the module that a batch calls if its weights are known already: k and v, once q is rounded."""
            if name not in self.twins:
                return None
            return (self.twins[name] if batch >= self.half else own[name]).forward

        own = {name: _twin(module, {}) for name, module in modules.items()}
        halts = turns(
            lambda number: self.turn.answer(self.turn.calls[number]),
            len(self.turn.calls),
            modules,
            place=self.turn.place,
            at_once=at_once,
            straight=straight,
        )
        for halted in halts:
            if (pairs := self._pairs(halted)) and halted.name not in self.twins:
                if halted.name in self.stacks:
                    self._round_experts(halted.name, pairs)
                elif group := self.waiting.get(self.linears[halted.name].name):
                    self._round_linears(group, pairs)
            for start in range(0, len(halted.calls), at_once):
                part = halted.calls[start : start + at_once]
                for call in part:
                    twin = self.twins.get(halted.name) if call.batch >= self.half else None
                    halted.answer(call, twin.forward if twin else None)
                    self._add(halted.name, call)
                halted.go_on(*part)  # what it read and gave is not held beside what others get

    def _pairs(self, halted: Turn) -> list[tuple[Call | None, Call]]:
        """Returns the calls of each batch in the source, if that comes here too, and in the quantized model."""
        by = {call.batch: call for call in halted.calls}
        return [(by.get(batch - self.half), call) for batch, call in by.items() if batch >= self.half]

    def _take(self, group: Inputs) -> None:
        self.waiting = {name: each for name, each in self.waiting.items() if each is not group}

    def _round_linears(self, group: Inputs, pairs: list[tuple[Call | None, Call]]) -> None:
        """Rounds the linears that read the input before which both models are halted."""
        width = self.work.tensors[f"{group.first}.weight"].shape[1]
        sums = Sums.empty(width, self.device)
        for plain, quantized in pairs:
            own = None if plain is None else _input(plain, self.turn.place).reshape(-1, width)
            beside = [] if own is None or plain is None else self._beside(group, plain, quantized)
            sums.add(own, _input(quantized, self.turn.place).reshape(-1, width), *beside)
        rounded = self.streams.round(self.work, group, sums)
        self._take(group)
        for path, linear in self.linears.items():
            if linear.name in rounded:
                weight = rounded[linear.name]
                module = self.block.get_submodule(path)
                self.twins[path] = _twin(module, {"weight": weight.t().contiguous() if is_turned(module) else weight})

    def _beside(self, group: Inputs, *calls: Call) -> list[torch.Tensor]:
        """Returns what the outputs of a linear are added to in both models, `[tokens, out]`, if that is known."""
        path = next((path for path, linear in self.linears.items() if linear.name == group.first), None)
        if path not in self.added or len(group.linears) > 1:
            return []
        states = [self.turn.place.fetch(self.states[call.batch]) for call in calls]
        flat, factor = [each.reshape(-1, each.shape[-1]) for each in states], self.added[path]
        return flat if factor == 1 else [each / factor for each in flat]

    def _round_experts(self, name: str, pairs: list[tuple[Call | None, Call]]) -> None:
        """Rounds the experts before whose module both models are halted."""
        stack = self.stacks[name]
        module = stack.module
        found: dict[str, torch.Tensor] = {}
        for expert in stack.experts:
            for linear in (*expert.first, *expert.last):
                assert linear.inside is not None
                found.setdefault(linear.inside.tensor, module.get_parameter(linear.inside.tensor).clone())
        calls = [
            (None if plain is None else _routed(module, plain, self.turn.place), _routed(module, own, self.turn.place))
            for plain, own in pairs
        ]
        spread = Spread([quantized for _, quantized in calls])
        for expert in stack.experts:
            rows = [_given(expert.number, *pair) for pair in calls]
            self.streams.tokens.append((sum(len(each[1]) for each in rows), (expert.first or expert.last)[0].shape[1]))
            for readers in filter(None, (expert.first, expert.last)):
                group = self.waiting[readers[0].name]
                sums, drawn = self._sums_of(expert, readers, stack, found, rows, spread)
                for member, weight in self.streams.round(self.work, group, sums, drawn).items():
                    spot = next(each.inside for each in readers if each.name == member)
                    assert spot is not None
                    spot.of(found[spot.tensor]).copy_(weight)
                self._take(group)
        self.twins[name] = _twin(module, found)

    def _sums_of(
        self,
        expert: Expert,
        readers: list[Linear],
        stack: ExpertInputs,
        rounded: Mapping[str, torch.Tensor],
        rows: list[tuple[torch.Tensor | None, torch.Tensor]],
        spread: Spread,
    ) -> tuple[Sums, Gram | None]:
        """Returns the sums over the inputs of an expert's linears, and their Gram if their tokens are too few."""
        module, last = stack.module, readers is expert.last

        def read(states: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return inner(_twin(module, parameters), expert.number, states) if last else states

        width = readers[0].shape[1]
        sums, tokens = Sums.empty(width, self.device), 0
        for plain, quantized in rows:
            if len(quantized):
                sums.add(None if plain is None else read(plain, {}), read(quantized, rounded))
            tokens += len(quantized)
        if tokens >= width:
            return sums, None
        drawn, other = sums.together(), Gram.empty(width, self.device)
        accumulate(other, read(spread.of(width), rounded))
        draw(drawn, other)
        return sums, drawn


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _mean(numbers: list[float]) -> float:
    return round(sum(numbers) / max(1, len(numbers)), 4)


def _twin(module: nn.Module, others: Mapping[str, torch.Tensor]) -> nn.Module:
    """Returns a module that shares all but some parameters with another, and that is not halted."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    twin._parameters = dict(module._parameters)
    for name, each in others.items():
        twin._parameters[name] = nn.Parameter(each, requires_grad=False)
    return twin


def _input(call: Call, place: Place) -> torch.Tensor:
    """Returns what a linear is called with."""
    found: torch.Tensor = place.fetch(call.args[0] if call.args else next(iter(call.kwargs.values())))
    return found


def _routed(module: nn.Module, call: Call, place: Place) -> tuple[torch.Tensor, Any]:
    """Returns the states that a module of experts is called with, and which expert gets which."""
    args, kwargs = place.fetch((call.args, call.kwargs))
    return routed(module, args, kwargs)[0]


def _given(
    expert: int, plain: tuple[torch.Tensor, Any] | None, quantized: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns the states that an expert of the quantized model gets, `[tokens, in]`, in the source and in it.

    The source has none of a batch that it does not run. Where each expert has states of its own, it has none of a
    token that it sends elsewhere.
    """
    states, chosen = quantized
    own = given_to(expert, states, chosen)
    if chosen is None or plain is None:
        return None, own
    return plain[0][(chosen == expert).any(-1)], own
