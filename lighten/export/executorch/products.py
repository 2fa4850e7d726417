"""Means and turned halves as products with constants, and heads that stay where they lie.

An operator outside of XNNPACK parts a block in two, and every part costs time when a token is written. So the mean of
RMSNorm becomes a product with a row of equal numbers, and what rotary embeddings put together from the halves of a
vector becomes a product with a matrix of ones and minus ones. Both are exact but for the order of a sum.

Models turn their heads before the positions, `[1, heads, n, width]`, and compute rotary embeddings there. ExecuTorch's
cache and attention take them behind. What is computed number by number gives the same either way, so it is computed as
the heads lie, and nothing is turned.

XNNPACK takes no new shape that names the number of tokens, but it takes one that leaves it to be inferred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WIDEST = 256
"""Widest vector whose pieces are put together by a product."""
_Piece = tuple[torch.Tensor, int, int, int]
"""A tensor, the first and the end of its last dimension, and the sign."""
_SUMS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
_BY_NUMBER = (*_SUMS, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
"""What is computed number by number, of one tensor and another or a number."""


class Constants(nn.Module):
    """What is multiplied with, by names, as buffers that a traced program has as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = False
        """Whether no more are made: a module cannot get buffers while it is traced."""

    def find(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Returns a constant, which is made if it is not there; None if it may not be made."""
        if name not in self._buffers:
            if self.fixed:
                return None
            self.register_buffer(name, make(), persistent=False)
        return self.get_buffer(name)


class Products(TorchFunctionMode):
    """Rewrites what is computed inside of it."""

    def __init__(self, constants: Constants) -> None:
        super().__init__()
        self.constants = constants
        # by the identity of a tensor, and with it, so that no other gets its identity
        self._pieces: dict[int, tuple[torch.Tensor, _Piece]] = {}
        self._lying: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._wider: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._means: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        kwargs = kwargs or {}
        if func in (torch.mean, torch.Tensor.mean) and (rewritten := self._mean(*args, **kwargs)) is not None:
            return rewritten
        if func in (torch.cat, torch.concat) and (rewritten := self._together(*args, **kwargs)) is not None:
            return rewritten
        if func in _SUMS and not kwargs and (rewritten := self._mean_and(*args)) is not None:
            return rewritten
        if func in (torch.transpose, torch.Tensor.transpose) and not kwargs:
            return self._turned(func, *args)
        if func in (torch.unsqueeze, torch.Tensor.unsqueeze) and not kwargs:
            return self._widened(func, *args)
        if func in (torch.Tensor.view, torch.Tensor.reshape, torch.reshape) and not kwargs:
            args = _inferred(*args)
        if func in _BY_NUMBER and not kwargs and (rewritten := self._as_it_lies(func, *args)) is not None:
            return rewritten
        found = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            self._cut(found, *args)
        elif func in (torch.neg, torch.Tensor.neg, torch.Tensor.__neg__) and (piece := self._piece(args[0])):
            tensor, first, end, sign = piece
            self._pieces[id(found)] = found, (tensor, first, end, -sign)
        return found

    def _mean(self, tensor: Any, dim: Any = None, keepdim: bool = False, **others: Any) -> torch.Tensor | None:
        last, width = dim in (-1, (-1,), [-1]), _width(tensor)
        if not last or not keepdim or others or width is None:
            return None
        row = self.constants.find(f"mean_{width}", lambda: torch.full((1, width), 1 / width))
        if row is None:
            return None
        found = nn.functional.linear(tensor, row)
        self._means[id(found)] = found, tensor, row
        return found

    def _mean_and(self, first: Any, second: Any) -> torch.Tensor | None:
        """Returns a mean and a number, which goes into the product."""
        mean = self._means.get(id(first))
        if mean is None or type(second) is not float:
            return None
        number = self.constants.find(f"number_{second!r}".replace(".", "_"), lambda: torch.tensor([second]))
        return None if number is None else nn.functional.linear(mean[1], mean[2], number)

    def _turned(self, func: Any, tensor: Any, first: int, second: int) -> Any:
        """Returns a tensor with two dimensions exchanged, and remembers how it lay if they are heads and positions."""
        if tensor.dim() != 4 or {first, second} not in ({1, 2}, {-3, -2}):
            return func(tensor, first, second)
        if (lying := self._lying.get(id(tensor))) is not None:
            return lying[1]
        found = func(tensor, first, second)
        self._lying[id(found)] = found, tensor
        return found

    def _widened(self, func: Any, tensor: Any, place: int) -> Any:
        """Returns a tensor with one more dimension: what all layers read is made once."""
        if (id(tensor), place) not in self._wider:
            self._wider[id(tensor), place] = tensor, func(tensor, place)
        return self._wider[id(tensor), place][1]

    def _as_it_lies(self, func: Any, first: Any, second: Any) -> torch.Tensor | None:
        """Returns what is computed number by number of a turned tensor, and of another or a number."""
        lying = [self._lying.get(id(each)) for each in (first, second)]
        if not any(lying):
            return None
        taken: list[Any] = []
        for each, known in zip((first, second), lying, strict=True):
            if known is not None:
                taken.append(known[1])
            elif not isinstance(each, torch.Tensor) or each.dim() < 2:
                taken.append(each)
            elif each.dim() == 4:
                taken.append(other := each.transpose(1, 2))
                self._lying[id(each)] = each, other
            else:
                return None
        return self._back(func(*taken))

    def _back(self, lying: torch.Tensor) -> torch.Tensor:
        found = lying.transpose(1, 2)
        self._lying[id(found)] = found, lying
        return found

    def _cut(self, found: Any, tensor: Any, place: Any) -> None:
        """Remembers a piece of the last dimension, `tensor[..., first:end]`."""
        if not (isinstance(place, tuple) and len(place) == 2 and place[0] is Ellipsis and isinstance(place[1], slice)):
            return
        width, asked = _width(tensor), (place[1].start, place[1].stop, place[1].step)
        if width is None or not all(each is None or type(each) is int for each in asked) or asked[2] not in (None, 1):
            return
        first, end, _ = place[1].indices(width)
        self._pieces[id(found)] = found, (tensor, first, end, 1)

    def _piece(self, tensor: Any) -> _Piece | None:
        found = self._pieces.get(id(tensor))
        return found[1] if found else None

    def _together(self, tensors: Any, dim: int = 0, **others: Any) -> torch.Tensor | None:
        pieces = [self._piece(each) for each in tensors]
        if dim != -1 or others or not all(pieces):
            return None
        whole = [each for each in pieces if each]
        tensor = whole[0][0]
        width = int(tensor.shape[-1])
        if width > WIDEST or any(each[0] is not tensor for each in whole):
            return None

        def make() -> torch.Tensor:
            return torch.cat([torch.eye(width)[first:end] * sign for _, first, end, sign in whole])

        name = "_".join(f"{'less' if sign < 0 else 'more'}_{first}_{end}" for _, first, end, sign in whole)
        matrix = self.constants.find(f"of_{width}_{name}", make)
        if matrix is None:
            return None
        lying = self._lying.get(id(tensor))
        return (
            nn.functional.linear(tensor, matrix)
            if lying is None
            else self._back(nn.functional.linear(lying[1], matrix))
        )


def _width(tensor: Any) -> int | None:
    """Returns the last dimension of a tensor of float32; None for others, and where it is not a fixed number."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or not tensor.dim():
        return None
    width = tensor.shape[-1]
    return width if type(width) is int else None


def _inferred(tensor: Any, *shape: Any) -> tuple[Any, ...]:
    """Returns a tensor and its new shape, in which the only dimension that changes is inferred."""
    given = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else list(shape)
    changing = [each for each in tensor.shape if type(each) is not int]
    named = [number for number, each in enumerate(given) if type(each) not in (int, torch.dtype)]
    if len(changing) != 1 or len(named) != 1 or str(given[named[0]]) != str(changing[0]):
        return (tensor, *shape)
    fixed = math.prod(each for each in tensor.shape if type(each) is int)
    others = math.prod(each for number, each in enumerate(given) if number not in named and each != -1)
    rest = fixed // others if others else 0
    if any(type(each) is not int for number, each in enumerate(given) if number not in named):
        return (tensor, *shape)
    return tensor, [-1 if number in named else rest if each == -1 else each for number, each in enumerate(given)]
