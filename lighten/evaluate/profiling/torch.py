"""A transformers model under torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from lighten.evaluate.profiling import PHASES, drive
from lighten.evaluate.profiling.verdict import Kind, Phase, collected
from lighten.evaluate.runtimes.torch import TorchRuntime
from lighten.evaluate.runtimes.torch_loading import stored

LABEL = "lighten:"
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "softmax", "bmm", "baddbmm")
PRODUCT = re.compile(r"(?:^|[:_])(?:addmm|mm|addmv|mv|gemm|gemv|dot|linear|matmul)(?:_|$)")
"""Pattern of the names of products: aten::mm, aten::_weight_int4pack_mm_for_cpu, bitsandbytes::gemv_4bit."""
COPIES = ("copy_", "_to_copy", "aten::to", "aten::cat", "contiguous", "clone", "repeat_interleave", "index_copy")
UNPACKING = ("dequant", "unpack")


def phases(runtime: TorchRuntime, ids: list[int], steps: int, trace: Path) -> list[Phase]:
    """Returns prefill and decoding, and writes the trace of both.

    On a GPU an operator's time is that of the kernels it launched.
    """
    gpu = runtime.device != "cpu"
    handles = _label_modules(runtime.model)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            drive(runtime, ids, steps, lambda name: record_function(LABEL + name))
    finally:
        for handle in handles:
            handle.remove()
    profiler.export_chrome_trace(str(trace))
    return _read(profiler.events(), gpu)


def _label_modules(model: Any) -> list[Any]:
    """Gives the embedding, the head and every quantized linear a name that the profiler shows."""
    named = [("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())]
    named += [("quantized", module) for module in model.modules() if stored(module)]
    handles = []
    for label, module in named:
        before, after = _label(label)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return handles


def _label(label: str) -> tuple[Callable[..., None], Callable[..., None]]:
    opened: list[Any] = []

    def before(*_: Any) -> None:
        opened.append(record_function(LABEL + label))
        opened[-1].__enter__()

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return before, after


def _read(events: Any, gpu: bool) -> list[Phase]:
    parts: dict[str, dict[tuple[str, Kind], list[float]]] = {name: {} for name in PHASES}
    seconds = dict.fromkeys(PHASES, 0.0)
    for event in events:
        if event.name.removeprefix(LABEL) in seconds and event.cpu_parent is None and event.name.startswith(LABEL):
            seconds[event.name.removeprefix(LABEL)] += event.time_range.elapsed_us() / 1e6
        if event.name.startswith(LABEL):
            continue
        above = _labels(event)
        phase = next((name for name in above if name in parts), None)
        own = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
        if phase and own > 0:
            parts[phase].setdefault((event.name, kind_of(event.name, above)), []).append(own)
    return [Phase(name, seconds[name], collected(parts[name])) for name in PHASES]


def _labels(event: Any) -> list[str]:
    """Returns the labels around an event, the nearest first."""
    found, parent = [], event.cpu_parent
    while parent is not None:
        if parent.name.startswith(LABEL):
            found.append(parent.name.removeprefix(LABEL))
        elif any(name in parent.name for name in ATTENTION[:3]):
            found.append("attention")
        parent = parent.cpu_parent
    return found


def kind_of(name: str, labels: list[str]) -> Kind:
    """Returns the purpose of an operator, by its name and the labels around it."""
    product = PRODUCT.search(name) is not None
    if "head" in labels or "embedding" in labels:
        return "head"
    if "attention" in labels or any(part in name for part in ATTENTION):
        return "attention"
    if any(part in name for part in UNPACKING) and not product:
        return "dequantization"
    if "quantized" in labels:
        return "products" if product else "dequantization"
    if product:
        return "products"
    return "copies" if any(part in name for part in COPIES) else "other"
