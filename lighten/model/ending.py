"""What a model does after its last block, for a few positions at a time: head, and whatever its own code adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lighten.errors import RequestError
from lighten.model.blockwise import BlockwiseModel

PROBE = 2
"""Tokens of the short sample that the model's code is run with."""


class Ending:
    """The head of a model, and the model's own code behind it.

    That code (scales, soft caps) is run by running the model on a short sample, in which every block gives what it
    gave to that sample before, and the head gives the logits in question.
    """

    def __init__(self, model: BlockwiseModel, ids: torch.Tensor) -> None:
        """Prepares it. `ids` are `[samples, length]`."""
        self.model = model
        self.probe = ids[:1, :PROBE]
        """A short sample. Its run has to go beside that of the others, and `keep` gets what each block gives to it."""
        head = model.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise RequestError(
                f"{type(model.model).__name__} has no head that is a linear: its loss cannot be measured"
            )
        self._head: nn.Linear = head
        self._answers: list[Any] = []
        self._plain: bool | None = None

    def keep(self, answer: Any) -> None:
        """Keeps what the next block gave to the short sample."""
        self._answers.append(answer)

    @contextmanager
    def filled(self) -> Iterator[torch.Tensor]:
        """Loads the head. Yields its weight, `[vocab, hidden]`."""
        name = next(name for name, each in self.model.model.named_modules() if each is self._head)
        with self.model.filled(name):
            yield self._head.weight

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the logits, float32 `[positions, vocab]`, of inputs of the head `[positions, hidden]`."""
        given: torch.Tensor = self._head(inputs).float()
        return self._behind(given)

    def derivative(self, inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the derivative of the summed loss of predicting `wanted` by what the head gives, float32."""
        with torch.no_grad():
            given = self._head(inputs).float()
        given.requires_grad_()
        with torch.enable_grad():
            logits = self._behind(given)
            if logits is not given:
                loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
                found: torch.Tensor = torch.autograd.grad(loss, given)[0]
                return found
        difference = torch.softmax(given.detach(), -1, out=given.detach())  # in place: it is large
        difference[torch.arange(len(difference), device=difference.device), wanted] -= 1
        return difference

    def _behind(self, given: torch.Tensor) -> torch.Tensor:
        """Runs the model's own code behind the head on what the head gave."""
        if self._plain:
            return given
        model, device = self.model.model, self.model.device
        answers = (
            tree_map(lambda each: each.to(device) if isinstance(each, torch.Tensor) else each, answer)
            for answer in self._answers  # which wait on the CPU if states do
        )
        embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding)]
        places: list[Any] = [*self.model.blocks.values(), *embeddings, self._head]

        def looked_up(module: nn.Embedding) -> Any:
            return lambda ids, *_, **__: torch.zeros(
                *ids.shape, module.embedding_dim, device=self.model.device, dtype=self.model.dtype
            )

        try:
            for block in self.model.blocks.values():
                block.forward = lambda *_, **__: next(answers)
            for each in embeddings:
                each.__dict__["forward"] = looked_up(each)
            self._head.__dict__["forward"] = lambda *_, **__: given[None]
            found = model(input_ids=self.probe.to(self.model.device), use_cache=False).logits
        finally:
            for module in places:
                module.__dict__.pop("forward", None)
        logits: torch.Tensor = found[0]
        if logits.shape != given.shape:
            raise RequestError(f"{type(model).__name__} changes the shape of its logits: its loss cannot be measured")
        self._plain = logits.data_ptr() == given.data_ptr()
        return given if self._plain else logits.float()


def mean_loss(model: BlockwiseModel, ids: torch.Tensor, rows: int) -> float:
    """Returns the mean loss of predicting `ids` `[samples, length]`, one block in memory at a time.

    Args:
        model: whose weights are loaded block by block.
        ids: the text.
        rows: positions whose logits are in memory at a time.
    """
    ending = Ending(model, ids)
    entering: dict[int, torch.Tensor] = {}
    batches = model.batches(ids)
    for _, _, turn in model.turns(ids, batches=(*batches, ending.probe), at_head=entering.__setitem__):
        *calls, probe = turn.calls
        for call in calls:
            turn.answer(call)
            turn.go_on(call)
        turn.answer(probe)
        ending.keep(probe.answer)
    total = 0.0
    with torch.inference_mode(), ending.filled():
        for number, batch in enumerate(batches):
            inputs, targets = entering.pop(number)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            for part, wanted in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
                logits = ending.logits(part.to(model.device))
                total += float(nn.functional.cross_entropy(logits, wanted.to(model.device), reduction="sum"))
    return total / (ids.numel() - len(ids))
