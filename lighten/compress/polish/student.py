"""The quantized model in training, and the source that it learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lighten.compress.distill.teacher import last_states, open_teacher
from lighten.compress.polish.coded import CodedLinear
from lighten.compress.polish.divergence import Head
from lighten.errors import Failure
from lighten.model import whole
from lighten.model.anatomy import HEAD
from lighten.model.discovery import blocks_of
from lighten.model.empty import Filler
from lighten.model.stream import fast_dtype
from lighten.model.unpacked import Unpacked, open_checkpoint
from lighten.step import Context, Report

THE_EMBEDDING = "the embedding, whose rows are looked up"
THE_HEAD = "the output head, which makes the distributions that are compared"
IN_ONE = "one of several matrices that the model holds in one tensor"
"""Reasons why scales stay."""


@dataclass
class Source:
    """What the source says: the inputs of its head for every position, from which its distributions follow."""

    head: Head
    states: torch.Tensor
    """`[sequences, length, hidden]`"""

    @classmethod
    @torch.no_grad()
    def ask(cls, path: Path, ids: torch.Tensor, context: Context, report: Report) -> Source:
        """Runs the source over all sequences `[sequences, length]`; then it is no longer in memory."""
        model = open_teacher(path, context)
        states = []
        for number, sequence in enumerate(ids):
            states.append(last_states(model, sequence[None].to(context.device))[0].clone())
            report(number + 1, len(ids), f"asking the source, sequence {number + 1}/{len(ids)}")
        head = Head.of(model)
        head.weight = head.weight.clone()
        return cls(head, torch.stack(states))


@dataclass
class Student:
    """The quantized model, in codes where it has them."""

    model: Any
    trained: dict[str, Any] = field(default_factory=dict)
    """Matrices in training, `CodedLinear` or `Blocks`, by the names that the files have."""
    linears: int = 0
    """Number of linears that they make up."""
    left: list[dict[str, str]] = field(default_factory=list)
    """Quantized matrices whose scales stay, and why."""
    own_head: torch.Tensor | None = None
    """Weight of the head in a file that has the embedding twice, each in a type of its own."""

    @classmethod
    def open(cls, path: Path, context: Context) -> Student:
        """Opens a quantized model directory.

        Raises:
            Failure: it has no quantized linears.
        """
        stored = open_checkpoint(path)
        if not isinstance(stored, Unpacked):
            raise Failure(f"{path} has no quantized linears")
        trusted = context.trust_remote_code
        model = whole.load(path, fast_dtype(context.device), trust_remote_code=trusted)
        student = cls(model)
        filler = Filler(model, [f"{name}.weight" for name in stored.packed])
        for name in stored.packed:
            place = filler.places[f"{name}.weight"].rpartition(".")[0]
            module = model.get_submodule(place)
            if why := _why_place_left(name, filler) or why_left(module):
                student.left.append({"what": name, "why": why})
                continue
            made = CodedLinear(stored.format.codes(stored.tensors(f"{name}.")), module.bias, model.dtype)
            model.set_submodule(place, made)
            student.trained[name] = made
            student.linears += 1
        if not student.trained:
            raise Failure(f"none of the {len(student.left)} quantized matrices has scales that can be trained")
        return student

    def prepare(self, device: str, *, recompute: bool) -> None:
        """Leaves nothing to train but the scales. If it is to `recompute`, layers keep their inputs alone."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for theta in self.scales().values():
            theta.requires_grad_()
        self.model.to(device)
        for block in blocks_of(self.model).values() if recompute else ():
            _recompute(block)

    def head(self) -> Head:
        """Returns what makes its logits."""
        found = Head.of(self.model)
        if self.own_head is not None:
            found.weight = self.own_head.to(found.weight)
        return found

    def scales(self) -> dict[str, torch.Tensor]:
        """Returns the logarithms of the changes of the scales, by matrix."""
        return {name: matrix.theta for name, matrix in self.trained.items()}


def _why_place_left(name: str, filler: Filler) -> str | None:
    """Returns why the scales of a quantized matrix in such a place stay; None if they can train."""
    if name == HEAD:
        return THE_HEAD
    return IN_ONE if f"{name}.weight" in filler.converted else None


def why_left(module: nn.Module) -> str | None:
    """Returns why the scales of the weight of a module stay; None if they can train."""
    if isinstance(module, nn.Embedding):
        return THE_EMBEDDING
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"  # GPT-2's, stored as a linear
    return None if plain else f"a {type(module).__name__}, whose own code uses its weight"


def _recompute(block: nn.Module) -> None:
    """Makes a block keep its inputs alone for the way back, and compute the rest again."""
    forward = block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = again
