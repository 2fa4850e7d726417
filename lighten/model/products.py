"""Matrix products at the speed of the hardware's short floats, if no precision is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

UNITS = ("avx512_bf16", "amx_bf16", "bf16")
"""Flags of a processor that has units for bfloat16."""
SHAPE = 128, 1024, 1024
"""Rows, inputs and outputs of the product that is timed."""


@cache
def fast_bfloat16() -> bool:
    """Returns whether matrix products in bfloat16 are at least as fast here as those in float32.

    Without units for bfloat16 they are several times slower. With units they are timed, once per process. Whether the
    units are used also depends on the library, its settings (`ONEDNN_MAX_CPU_ISA`) and the virtual machine.
    """
    if not any(torch.cpu.get_capabilities().get(name) for name in UNITS):
        return False
    seconds = _seconds((torch.bfloat16, torch.float32))
    return seconds[torch.bfloat16] <= seconds[torch.float32]


@torch.inference_mode()
def _seconds(dtypes: Sequence[torch.dtype], rounds: int = 12) -> dict[torch.dtype, float]:
    """Returns the shortest time of a product in each type. Other work on the machine only makes a time longer.

    The types take turns, and one thread computes. On a busy machine threads wait for each other. Then the answer would
    change from one process to the next, and with it the bytes of what is made.
    """
    rows, inputs, outputs = SHAPE
    factors = {dtype: [torch.ones(size, inputs, dtype=dtype) for size in (rows, outputs)] for dtype in dtypes}
    shortest = dict.fromkeys(dtypes, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds + 1):  # the first one makes the kernels
            for dtype, (left, right) in factors.items():
                start = time.perf_counter()
                left @ right.t()
                shortest[dtype] = min(shortest[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return shortest


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets float32 matrix products use the fastest arithmetic that is exact for inputs of `dtype`.

    bfloat16 values survive the conversion to bfloat16 (CPU) and TF32 (GPU) unchanged, and both units sum in float32. So
    the products are those of float32 arithmetic at a multiple of its speed. float32 values get float32 products.

    torch has one switch for the whole process. So it is thrown back when the last thread leaves, and float32 products
    of other threads have bfloat16 inputs until then.
    """
    if dtype != torch.bfloat16:
        yield
        return
    with _LOCK:
        _INSIDE.append(_allow() if not _INSIDE else None)
    try:
        yield
    finally:
        with _LOCK:
            first = _INSIDE[0]
            _INSIDE.pop()
            if not _INSIDE and first:
                first()


_LOCK = threading.Lock()
_INSIDE: list[Callable[[], None] | None] = []
"""One entry for every thread that is inside. The first one undoes what was allowed."""


def _allow() -> Callable[[], None]:
    """Allows the fast arithmetic in the whole process; returns what forbids it again."""
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    gpu: Any = torch.backends.cuda.matmul
    if cpu is None or not hasattr(gpu, "fp32_precision"):  # torch 2.8 knows the older switch only, and only for GPUs
        allowed, gpu.allow_tf32 = gpu.allow_tf32, True

        def forbid_again() -> None:
            gpu.allow_tf32 = allowed

        return forbid_again
    before = cpu.fp32_precision, gpu.fp32_precision
    cpu.fp32_precision, gpu.fp32_precision = "bf16", "tf32"

    def restore() -> None:
        cpu.fp32_precision, gpu.fp32_precision = before

    return restore
