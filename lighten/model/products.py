"""Matrix products at the speed of the hardware's short floats, where that costs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets float32 matrix products use the fastest arithmetic that is exact for inputs of `dtype`.

    bfloat16 values survive the conversion to bfloat16 (CPU) and TF32 (GPU) unchanged, and both units sum in float32:
    the products are those of float32 arithmetic at a multiple of its speed. float32 values get float32 products.
    """
    if dtype != torch.bfloat16:
        yield
        return
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    gpu: Any = torch.backends.cuda.matmul
    if cpu is None or not hasattr(gpu, "fp32_precision"):  # torch 2.8 knows the older switch only, and only for GPUs
        allowed, gpu.allow_tf32 = gpu.allow_tf32, True
        try:
            yield
        finally:
            gpu.allow_tf32 = allowed
        return
    before = cpu.fp32_precision, gpu.fp32_precision
    cpu.fp32_precision, gpu.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
