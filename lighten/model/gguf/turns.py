"""How values of a checkpoint's tensor differ from those of a GGUF file, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts

if TYPE_CHECKING:
    import torch

    Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Model:
    """What a turn may depend on: config.json, and the sizes in it."""

    config: dict[str, Any]
    facts: ModelFacts
    whole: dict[str, Any] | None = None
    """config.json of the model that it is a part of, if it is the language model of one that also sees."""

    def size(self, key: str) -> int:
        """Returns a whole number of config.json."""
        return int(self.config[key])


def _same(tensor: torch.Tensor, model: Model) -> Tensors:
    return [tensor]


def _first(tensors: Tensors, model: Model) -> torch.Tensor:
    return tensors[0]


def _all_alike(channels: torch.Tensor, model: Model) -> list[torch.Tensor | None] | None:
    return None


@dataclass(frozen=True)
class Turn:
    """A bijection between one tensor of a checkpoint and one or more tensors of a file."""

    there: Callable[[torch.Tensor, Model], Tensors] = _same
    """Returns the tensors of the file, from the stored one."""
    back: Callable[[Tensors, Model], torch.Tensor] = _first
    """Returns the stored tensor, from those of the file."""
    channels: Callable[[torch.Tensor, Model], list[torch.Tensor | None] | None] = _all_alike
    """Returns the importance of the input channels of each tensor of the file, from that of the stored one `[in]`;
    None where it is the same, and in a list for a tensor whose inputs are others."""
    exact: bool = True
    """Whether values only change their places."""


SAME = Turn()


def single(
    there: Callable[[torch.Tensor, Model], torch.Tensor],
    back: Callable[[torch.Tensor, Model], torch.Tensor],
    *,
    exact: bool = True,
) -> Turn:
    """Returns the turn of one tensor into one. A turn that is not exact gets float32."""

    def forth(tensor: torch.Tensor, model: Model) -> Tensors:
        return [there(tensor if exact else tensor.float(), model)]

    return Turn(forth, lambda tensors, model: back(tensors[0], model), exact=exact)


def after(first: Turn, second: Turn) -> Turn:
    """Returns a turn of one tensor, and another one of what comes of it."""
    return Turn(
        lambda tensor, model: second.there(first.there(tensor, model)[0], model),
        lambda tensors, model: first.back([second.back(tensors, model)], model),
        exact=first.exact and second.exact,
    )


PLUS_ONE = single(lambda tensor, _: tensor + 1.0, lambda tensor, _: tensor - 1.0, exact=False)
"""Weights of norms that are stored less one. llama.cpp wants them whole."""
NEGATIVE_EXP = single(lambda tensor, _: -tensor.exp(), lambda tensor, _: (-tensor).log(), exact=False)
"""Decay of a state, stored as a logarithm."""
NEGATIVE_EXP_COLUMN = single(
    lambda tensor, _: -tensor.exp()[:, None], lambda tensor, _: (-tensor[:, 0]).log(), exact=False
)
COLUMN = single(lambda tensor, _: tensor[:, None], lambda tensor, _: tensor[:, 0])
"""A vector, in a file `[n, 1]`."""
DEPTHWISE = single(lambda tensor, _: tensor[:, 0], lambda tensor, _: tensor[:, None])
"""Kernels of a convolution of each channel by itself, `[channels, 1, kernel]`."""


def times(factor: Callable[[Model], float]) -> Turn:
    """Returns the turn that multiplies by a factor, unless that is one."""

    def there(tensor: torch.Tensor, model: Model) -> torch.Tensor:
        return tensor if (found := factor(model)) == 1.0 else tensor.float() * found

    def back(tensor: torch.Tensor, model: Model) -> torch.Tensor:
        return tensor if (found := factor(model)) == 1.0 else tensor.float() / found

    return Turn(lambda tensor, model: [there(tensor, model)], lambda tensors, model: back(tensors[0], model))


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns q or k rows `[heads * head_dim, ...]` in llama.cpp's order, from Hugging Face's."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns q or k rows in Hugging Face's order, from llama.cpp's: the inverse of `interleave`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def rotated(heads: Callable[[Model], int]) -> Turn:
    """Returns the turn of q or k for an architecture in which llama.cpp rotates neighbouring rows of a head."""
    return single(lambda tensor, model: interleave(tensor, heads(model)), lambda t, m: deinterleave(t, heads(m)))


QUERY_ROWS = rotated(lambda model: model.facts.heads)
KEY_ROWS = rotated(lambda model: model.facts.kv_heads)


def cut(sizes: Callable[[torch.Tensor, Model], Sequence[int]], axis: int = -2) -> Turn:
    """Returns the turn that cuts a tensor along an axis. Sizes get the tensor."""

    def back(tensors: Tensors, model: Model) -> torch.Tensor:
        import torch

        return torch.cat(tensors, axis)

    def there(tensor: torch.Tensor, model: Model) -> Tensors:
        import torch

        return [*torch.split(tensor, list(sizes(tensor, model)), axis)]

    return Turn(there, back)


def halves(axis: int = -2) -> Turn:
    """Returns the turn that cuts a tensor into two halves."""
    return cut(lambda tensor, _: [tensor.shape[axis] // 2] * 2, axis)


def _transposed_halves(tensor: torch.Tensor, model: Model) -> Tensors:
    return [*tensor.transpose(-1, -2).chunk(2, -2)]


def _transposed_halves_back(tensors: Tensors, model: Model) -> torch.Tensor:
    import torch

    return torch.cat(tensors, -2).transpose(-1, -2)


TRANSPOSED = single(lambda tensor, _: tensor.transpose(-1, -2), lambda tensor, _: tensor.transpose(-1, -2))
"""Matrices that are stored `[in, out]`."""
TRANSPOSED_HALVES = Turn(_transposed_halves, _transposed_halves_back)
"""Gate and up of all experts, stored in one `[experts, in, 2 * out]`."""


def _alternate(tensor: torch.Tensor, axis: int) -> Tensors:
    shape = [*tensor.shape]
    axis %= len(shape)
    parts = tensor.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return [part.contiguous() for part in parts.unbind(axis + 1)]


def _alternate_back(tensors: Tensors, axis: int) -> torch.Tensor:
    import torch

    axis %= tensors[0].dim()
    shape = [*tensors[0].shape]
    return torch.stack(tensors, axis + 1).reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


ALTERNATE = Turn(lambda tensor, _: _alternate(tensor, -1), lambda tensors, _: _alternate_back(tensors, -1))
"""Values of gate and up that take turns along the last axis."""
TRANSPOSED_ALTERNATE = Turn(
    lambda tensor, _: _alternate(tensor.transpose(-1, -2), -2),
    lambda tensors, _: _alternate_back(tensors, -2).transpose(-1, -2),
)
"""Gate and up of all experts, stored in one `[experts, in, 2 * out]`, where their columns take turns."""
