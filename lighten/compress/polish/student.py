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
    linears: dict[str, CodedLinear] = field(default_factory=dict)
    """By the names that the files have."""
    left: list[dict[str, str]] = field(default_factory=list)
    """Quantized matrices whose scales stay, and why."""

    @classmethod
    def open(cls, path: Path, context: Context, *, recompute: bool) -> Student:
        """Opens a quantized model directory. If it is to `recompute`, its layers keep their inputs alone.

        Raises:
            Failure: it has no quantized linears.
        """
        stored = open_checkpoint(path)
        if not isinstance(stored, Unpacked):
            raise Failure(f"{path} has no quantized linears")
        trusted = context.trust_remote_code
        model = whole.load(path, fast_dtype(context.device), trust_remote_code=trusted)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        student = cls(model)
        filler = Filler(model, [f"{name}.weight" for name in stored.packed])
        for name in stored.packed:
            place = filler.places[f"{name}.weight"].rpartition(".")[0]
            module = model.get_submodule(place)
            if why := _why_left(name, filler, module):
                student.left.append({"what": name, "why": why})
                continue
            made = CodedLinear(stored.format.codes(stored.tensors(f"{name}.")), module.bias, model.dtype)
            model.set_submodule(place, made)
            student.linears[name] = made
        if not student.linears:
            raise Failure(f"none of the {len(student.left)} quantized matrices has scales that can be trained")
        model.to(context.device)
        for block in blocks_of(model).values() if recompute else ():
            _recompute(block)
        return student

    def scales(self) -> dict[str, torch.Tensor]:
        """Returns the logarithms of the changes of the scales, by linear."""
        return {name: linear.theta for name, linear in self.linears.items()}


def _why_left(name: str, filler: Filler, module: nn.Module) -> str | None:
    """Returns why the scales of a quantized matrix stay; None if they train."""
    if name == HEAD:
        return "the output head, which makes the distributions that are compared"
    if f"{name}.weight" in filler.converted:
        return "one of several matrices that the model holds in one tensor"
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
