"""Whether weights are numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Returns whether every number of each tensor is finite.

    The least and the largest tell: NaN is both wherever it occurs. `torch.isfinite` makes copies of the tensor, and
    takes many times longer.
    """
    found = [_ends(tensor).isfinite().all() for tensor in tensors]
    return torch.stack(found).tolist() if found else []


def _ends(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the least and the largest number of a tensor, `[2]`; zeros if there is none, or none can be infinite."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.zeros(2, device=tensor.device)
    return torch.stack(torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor))
