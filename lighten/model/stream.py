"""How many tokens go through a layer at once, and in which arithmetic."""

from __future__ import annotations

import torch

from lighten.model import accelerator
from lighten.model.products import fast_bfloat16

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Number of tokens that go through a layer at once. They fill the units of a device, and no more."""


def batch_of(device: str, length: int) -> int:
    """Returns the number of sequences of a length that go through a layer at once."""
    return max(1, BATCH_TOKENS[accelerator.device_type(device)] // length)


def fast_dtype(device: str) -> torch.dtype:
    """Returns bfloat16 if the device multiplies it in hardware, else float32."""
    return torch.bfloat16 if device != "cpu" or fast_bfloat16() else torch.float32
