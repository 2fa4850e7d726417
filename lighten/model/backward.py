"""Gradients of a model of any family, with the weights of one of its blocks in memory.

On the way forward every block's inputs are kept, and what it gives is cut from what made it. The code between blocks,
which is the model's own, stays connected for autograd. On the way back every block runs again, with gradients, and
hands the gradients of its inputs to that code, which brings them to the blocks before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lighten.errors import RequestError
from lighten.model.blockwise import BlockwiseModel
from lighten.model.ending import Ending
from lighten.model.suspension import Call, Turn

Path = tuple[Any, ...]


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yields the tensors in arguments or answers, with the way to each: keys and numbers."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for number, each in enumerate(value):
            yield from tensors_in(each, (*path, number))
    elif isinstance(value, MutableMapping):
        for key, each in value.items():
            yield from tensors_in(each, (*path, key))


def exchanged(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns arguments with other tensors. Lists and dictionaries are copied, so that what fills them is seen."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and type(value) is not tuple:  # with named fields
        return type(value)(*(exchanged(each, change) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(exchanged(each, change) for each in value)
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, each in list(value.items()):
            made[key] = exchanged(each, change)
        return made
    return value


@dataclass
class _Kept:
    """A call of a block: what it was given, and what it gave."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[torch.Tensor] = field(default_factory=list)
    """What the block gave, cut from what made it. The gradients of all its uses add up here."""


def floats(result: Any, before: Any, after: Any) -> list[torch.Tensor]:
    """Returns what a block gives: its answer, and what it left in the dictionaries among its arguments."""
    known = {path: id(tensor) for path, tensor in tensors_in(before)}
    left = [tensor for path, tensor in tensors_in(after) if known.get(path) != id(tensor)]
    found = [*(tensor for _, tensor in tensors_in(result)), *left]
    return [tensor for tensor in found if tensor.is_floating_point()]


class Gradients:
    """One pass forward, and one back."""

    def __init__(self, model: BlockwiseModel, ids: torch.Tensor) -> None:
        """Prepares the passes of `ids` `[samples, length]`, each sample by itself."""
        self.model, self.ids = model, ids
        self._turns: list[tuple[int, str, list[_Kept]]] = []
        self._entering: dict[int, torch.Tensor] = {}
        self._embedded: list[torch.Tensor] = []
        self.embedding_squares = 0.0
        """Sum of the squares of the derivatives by what the embedding gave, once the pass back is done."""

    def forward(self) -> Iterator[int]:
        """Runs the blocks, and yields the number of each that is done."""
        rows = torch.split(self.ids, 1)
        self._ending = Ending(self.model, self.ids)
        embedding = self.model.model.get_input_embeddings()
        hooks = [embedding.register_forward_hook(self._embed)]
        try:
            for index, _, turn in self.model.turns(
                self.ids,
                batches=(*rows, self._ending.probe),
                inference=False,
                at_head=self._entering.__setitem__,
            ):
                *calls, probe = turn.calls
                self._turns.append((index, turn.name, [self._answer(turn, call) for call in calls]))
                turn.answer(probe)
                self._ending.keep(probe.answer)
                yield turn.number
        finally:
            for hook in hooks:
                hook.remove()

    def _embed(self, module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:2] == self._ending.probe.shape and len(self._embedded) == len(self.ids):
            return output
        self._embedded.append(output.detach().requires_grad_())
        return self._embedded[-1].clone()  # a model may change it in place

    def _answer(self, turn: Turn, call: Call) -> _Kept:
        """Runs a block for a call, and keeps what the way back needs."""
        before = exchanged(call.kwargs, lambda tensor: tensor)
        turn.answer(call)
        call.answer = exchanged(call.answer, torch.Tensor.detach)
        given = floats(call.answer, before, call.kwargs)
        for tensor in given:
            tensor.requires_grad_()
        return _Kept(call.batch, call.args, before, given)

    def from_head(self, rows: int) -> tuple[float, torch.Tensor]:
        """Brings the derivative of the loss to what the last block gave. The loss is summed over tokens.

        Args:
            rows: positions whose logits are in memory at a time.

        Returns:
            The mean square of the derivative by what the head gives, and XᵀX of the inputs of the head.
        """
        squares, gram = 0.0, None
        with self._ending.filled() as weight:
            for row, ids in enumerate(self.ids):
                entering = self._entering.pop(row)
                inputs = entering.detach()[0]
                back = torch.zeros_like(inputs)
                for start in range(0, len(inputs) - 1, rows):
                    part = slice(start, min(start + rows, len(inputs) - 1))
                    wanted = ids[part.start + 1 : part.stop + 1].to(inputs.device)
                    difference = self._ending.derivative(inputs[part], wanted)
                    back[part] = difference.to(inputs.dtype) @ weight
                    squares += float(difference.square_().sum())
                wide = inputs.float()
                gram = wide.t() @ wide if gram is None else gram.addmm_(wide.t(), wide)
                torch.autograd.backward(entering, back[None], retain_graph=True)
            size = self.ids.numel() * len(weight)
        assert gram is not None
        return squares / size, gram.cpu()

    def back(self) -> Iterator[tuple[int, nn.Module, Callable[[], None]]]:
        """Yields every block, filled, from the last to the first, and the function that runs it for all samples."""
        while self._turns:
            index, name, calls = self._turns.pop()
            with self.model.filled(name) as block:

                def run(block: nn.Module = block, name: str = name, calls: Sequence[_Kept] = calls) -> None:
                    for call in calls:
                        self._back(block, name, call)

                yield index, block, run
        self.embedding_squares = sum(
            float(each.grad.float().square().sum()) for each in self._embedded if each.grad is not None
        )

    def _back(self, block: nn.Module, name: str, call: _Kept) -> None:
        pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def loose(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in pairs:
                made = tensor.detach().to(self.model.device)
                pairs[id(tensor)] = (tensor, made.requires_grad_() if tensor.requires_grad else made)
            return pairs[id(tensor)][1]

        args, kwargs = exchanged(call.args, loose), exchanged(call.kwargs, loose)
        before = exchanged(kwargs, lambda tensor: tensor)
        try:
            with torch.enable_grad():
                result = block(*args, **kwargs)
            made = floats(result, before, kwargs)
            ways = [
                (tensor, given.grad.to(tensor.device))
                for tensor, given in zip(made, call.given, strict=True)
                if given.grad is not None and tensor.requires_grad
            ]
            if ways:
                torch.autograd.backward([tensor for tensor, _ in ways], [gradient for _, gradient in ways])
        except (RuntimeError, ValueError) as error:
            raise RequestError(
                f"{self.model.checkpoint.facts.architecture} has no gradients in {name} "
                f"({str(error).splitlines()[0]}): leave out what needs them (a budget, score: taylor)"
            ) from error
        call.given.clear()
        passed = [(tensor, loosened.grad) for tensor, loosened in pairs.values() if loosened.grad is not None]
        if passed:
            torch.autograd.backward(
                [tensor for tensor, _ in passed],
                [gradient.to(tensor.device) for tensor, gradient in passed],
                retain_graph=True,
            )
