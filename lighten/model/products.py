"""Matrix products at the speed of the hardware's short floats, where that costs nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

UNITS = ("avx512_bf16", "amx_bf16", "bf16")
"""What a processor says that has units for bfloat16."""
SHAPE = 128, 1024, 1024
"""Rows, inputs and outputs of the product that is timed."""


@cache
def fast_bfloat16() -> bool:
    """Returns whether matrix products in bfloat16 are at least as fast here as those in float32.

    Without units for bfloat16 they are several times slower. With them they are timed, once per process: whether they
    are used depends on the library too, its settings (`ONEDNN_MAX_CPU_ISA`) and what a virtual machine lets through.
    """
    if not any(torch.cpu.get_capabilities().get(name) for name in UNITS):
        return False
    return _seconds(torch.bfloat16) <= _seconds(torch.float32)


@torch.inference_mode()
def _seconds(dtype: torch.dtype, repeats: int = 5) -> float:
    """Returns the shortest time of a product in `dtype`: what else the machine does only makes one longer."""
    rows, inputs, outputs = SHAPE
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    shortest = float("inf")
    for _ in range(repeats + 1):  # the first one makes the kernel
        start = time.perf_counter()
        left @ right.t()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


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
