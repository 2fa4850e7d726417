"""The states between a model's layers, on each runtime that shows them, to find where two models differ."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np

from lighten.evaluate.runtimes.choose import opener
from lighten.evaluate.runtimes.runtime import Floats, Ids, Runtime
from lighten.model.llama_library import load
from lighten.plugins import found_at

States = dict[str, Floats]
"""States `[n, hidden]` by place, in the order of computation: "layer 0, attention", "layer 0", …"""

_LLAMA = re.compile(r"(ffn_inp|l_out)-(\d+)")
_PLACES = {"ffn_inp": "layer {}, attention", "l_out": "layer {}"}


def trace(runtime: Runtime, ids: Ids) -> States | None:
    """Returns the states between the layers for `ids [n]`; None if the runtime does not show them."""
    tracer = opener(runtime.name).tracer
    return None if tracer is None else found_at(tracer)(runtime, ids)


def first_difference(ours: States, theirs: States, tolerance: float) -> str | None:
    """Returns the first place where two traces differ by more than a share of their size, in words."""
    for place, expected in ours.items():
        found = theirs.get(place)
        if found is None or found.shape != expected.shape:
            continue
        size = float(np.linalg.norm(expected)) or 1.0
        gap = float(np.linalg.norm(found - expected)) / size
        if not gap <= tolerance:
            return f"{place} (off by {gap:.2g} of its size)"
    return None


def of_torch(runtime: Any, ids: Ids) -> States:
    """Returns the states of a model of transformers."""
    import torch

    decoder = runtime.model.get_decoder()
    seen: States = {}
    hooks = []

    def note(place: str, tensor: torch.Tensor) -> None:
        seen[place] = tensor.detach().float().reshape(-1, tensor.shape[-1]).cpu().numpy()

    def before(place: str) -> Any:
        return lambda _module, inputs, named: note(place, inputs[0] if inputs else named["hidden_states"])

    for number, layer in enumerate(decoder.layers):
        middle = getattr(layer, "pre_feedforward_layernorm", None)
        if middle is None and not hasattr(layer, "post_feedforward_layernorm"):
            middle = getattr(layer, "post_attention_layernorm", None)
        if middle is not None:
            hooks.append(middle.register_forward_pre_hook(before(f"layer {number}, attention"), with_kwargs=True))
        hooks.append(
            layer.register_forward_hook(
                lambda _module, _inputs, output, number=number: note(
                    f"layer {number}", output[0] if isinstance(output, tuple) else output
                )
            )
        )
    try:
        runtime.logits(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def of_llama_cpp(runtime: Any, ids: Ids) -> States:
    """Returns the states of a GGUF model. ggml gives tensors by name while it computes them."""
    library = load("watching a GGUF file").ggml
    library.ggml_get_name.restype, library.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    library.ggml_nbytes.restype, library.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    seen: States = {}

    def callback(tensor: int, asking: bool, _data: Any) -> bool:
        name = library.ggml_get_name(tensor).decode()
        found = _LLAMA.fullmatch(name)
        if asking or not found:
            return found is not None
        values = np.empty(library.ggml_nbytes(tensor) // 4, dtype=np.float32)
        library.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        if values.size % len(ids) == 0:
            seen[_PLACES[found[1]].format(found[2])] = values.reshape(len(ids), -1)
        return True

    runtime.watched(callback, ids)
    return seen
