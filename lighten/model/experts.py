"""Matrices that are stored as parts of a larger tensor: those of experts, and weights stored as `[in, out]`.

transformers keeps the experts of a layer in one module with tensors of three dimensions. Files hold them so, or have
one matrix per expert. Every method takes one matrix `[out, in]` at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ONE = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
"""Name of one expert's matrix, as lighten writes it and vLLM reads it."""


LAST = "down_proj"
"""Name of the parameter with the last matrix of every expert."""


@dataclass(frozen=True)
class Slice:
    """A matrix `[out, in]` in a larger tensor."""

    tensor: str
    """Name of the tensor."""
    expert: int | None = None
    """Its place in a stack; None if the tensor is one matrix."""
    transposed: bool = False
    """Whether the tensor has inputs before outputs."""
    start: int = 0
    """First of the outputs."""
    step: int = 1
    """Distance of the outputs."""
    outputs: int | None = None
    """Number of outputs; None for all."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a view of the matrix in the tensor."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        matrix = matrix.t() if self.transposed else matrix
        if self.outputs is None:
            return matrix
        return matrix[self.start : self.start + self.outputs * self.step : self.step]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, int]:
        """Returns `[out, in]`, from the shape of the tensor."""
        rows, columns = whole[-2:]
        rows, columns = (columns, rows) if self.transposed else (rows, columns)
        return (rows if self.outputs is None else self.outputs), columns


@dataclass(frozen=True)
class Layout:
    """How a module keeps the matrices of its experts."""

    transposed: bool = False
    concatenated: bool = True
    """Whether all outputs of the gates lie before those of `up`; else they alternate."""
    gated: bool = True

    def place(self, part: str, expert: int, shapes: dict[str, tuple[int, ...]]) -> Slice | None:
        """Returns where a matrix of an expert lies among the module's parameters.

        Args:
            part: gate_proj, up_proj or down_proj.
            expert: its number.
            shapes: of the module's parameters.

        Returns:
            None if the module has no such matrix.
        """
        if part == LAST or not self.gated:
            known = part in shapes and expert < shapes[part][0]
            return Slice(part, expert, self.transposed) if known else None
        if "gate_up_proj" not in shapes or expert >= shapes["gate_up_proj"][0]:
            return None
        both = shapes["gate_up_proj"][2 if self.transposed else 1]
        second = part == "up_proj"
        start, step = (second * (both // 2), 1) if self.concatenated else (int(second), 2)
        return Slice("gate_up_proj", expert, self.transposed, start, step, both // 2)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of an expert's matrices."""
        return ("gate_proj", "up_proj", LAST) if self.gated else ("up_proj", LAST)


UNMARKED = {"Llama4TextExperts": Layout(transposed=True), "LongcatFlashExperts": Layout()}
"""Layouts of the classes that transformers does not mark with its own flags."""


def layout_of(module: Any) -> Layout | None:
    """Returns the layout of a module of experts; None if it is another module."""
    if hasattr(module, "_is_expert_parallel"):
        return Layout(module.is_transposed, module.is_concatenated, module.has_gate)
    return UNMARKED.get(type(module).__name__)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's own parameters that hold matrices of experts."""
    return {name: tuple(each.shape) for name, each in module.named_parameters(recurse=False) if each.dim() == 3}


def number_of(module: nn.Module) -> int:
    """Returns the number of experts that have weights."""
    return min(shape[0] for shape in shapes_of(module).values())


def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[torch.Tensor, Any]]:
    """Returns the states of a call of a module of experts, and which of them each expert gets.

    The second of each pair is a tensor `[tokens, k]` of experts. It is None where the first has a stack of states, one
    for each expert, in which states that are zero do not count.
    """
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    states = tensors[0]
    chosen = next((each for each in tensors[1:] if not each.is_floating_point()), None)
    if chosen is None:
        return [(states.reshape(number_of(module), -1, states.shape[-1]), None)]
    return [(states.reshape(-1, states.shape[-1]), chosen.reshape(-1, chosen.shape[-1]))]


def given_to(expert: int, states: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """Returns the states `[tokens, in]` that an expert gets."""
    if chosen is None:
        own = states[expert]
        return own[own.abs().sum(-1) > 0]
    return states[(chosen == expert).any(-1)]


def inner(module: Any, expert: int, states: torch.Tensor) -> torch.Tensor:
    """Returns what an expert makes of states `[tokens, in]` before its last matrix: `[tokens, width]`."""
    layout = layout_of(module)
    assert layout is not None
    name = "gate_up_proj" if layout.gated else "up_proj"
    weight = Slice(name, expert, layout.transposed).of(module.get_parameter(name))
    bias = getattr(module, f"{name}_bias", None) if getattr(module, "has_bias", False) else None
    found = nn.functional.linear(states, weight, None if bias is None else bias[expert])
    if not layout.gated:
        return module.act_fn(found)  # type: ignore[no-any-return]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(found)  # type: ignore[no-any-return]
    gate, up = found.chunk(2, -1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]
