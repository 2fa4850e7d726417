"""Means and turned halves as products with constants, which XNNPACK runs where it has no operator of their own.

An operator outside of XNNPACK parts a block in two, and every part costs time when a token is written. So the mean of
RMSNorm becomes a product with a row of equal numbers, and what rotary embeddings put together from the halves of a
vector becomes a product with a matrix of ones and minus ones. Both are exact but for the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WIDEST = 256
"""Widest vector whose pieces are put together by a product."""
_Piece = tuple[torch.Tensor, int, int, int]
"""A tensor, the first and the end of its last dimension, and the sign."""


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
        self._pieces: dict[int, tuple[torch.Tensor, _Piece]] = {}  # with the tensor, so that no other gets its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        kwargs = kwargs or {}
        if func in (torch.mean, torch.Tensor.mean) and (rewritten := self._mean(*args, **kwargs)) is not None:
            return rewritten
        if func in (torch.cat, torch.concat) and (rewritten := self._together(*args, **kwargs)) is not None:
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
        return None if row is None else nn.functional.linear(tensor, row)

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
        return None if matrix is None else nn.functional.linear(tensor, matrix)


def _width(tensor: Any) -> int | None:
    """Returns the last dimension of a tensor of float32; None for others, and where it is not a fixed number."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or not tensor.dim():
        return None
    width = tensor.shape[-1]
    return width if type(width) is int else None
