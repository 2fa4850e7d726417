"""A GGUF file quantized by llama.cpp: its types, its importance matrix, and the facts of the result."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure
from lighten.export.gguf.types import TYPES
from lighten.model.gguf.family import Place, expert_count, place_of, places
from lighten.model.gguf.table import family_of
from lighten.model.gguf.towers import name_in
from lighten.model.gguf.turns import Model
from lighten.model.llama_library import Library, load
from lighten.step import Report, silent

if TYPE_CHECKING:
    import numpy as np

K_BLOCK = 256
_PROGRESS = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+)")

Importance = Mapping[str, "np.ndarray[Any, np.dtype[np.float32]]"]


def importance(grams: Path, model: Model) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Returns llama.cpp's importance matrix, mean x² per input channel `[in]`, by GGUF tensor name.

    A channel that the calibration data left at zero gets a millionth of the mean, because llama.cpp divides by sums of
    these. A tensor of all experts has the channels of each of them, one expert after the other. An expert that no token
    reached gets the mean of the others.
    """
    import numpy as np
    import torch

    from lighten.model.grams import read_diagonals

    known: dict[str, Place] = {}
    for place in places(family_of(model.facts, model.config), model):
        known.setdefault(place.stored, place)
    found: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    of_experts: dict[str, dict[int, np.ndarray[Any, np.dtype[np.float32]]]] = {}
    for linear, diagonal, tokens in read_diagonals(grams):
        name = name_in(model.whole or model.config, linear)
        if name is None or (at := place_of(known, name)) is None:
            raise Failure(
                f"{grams} has the Gram of {linear}, which a GGUF file has no place for: sweep the model again"
            )
        place, expert = at
        channels = channel_importance(np.asarray(diagonal), tokens)
        turned = place.rule.turn.channels(torch.from_numpy(channels), model) or [torch.from_numpy(channels)] * len(
            place.names
        )
        for name, values in zip(place.names, turned, strict=True):
            if values is None:
                continue
            if expert is None:
                found[name] = values.numpy()
            elif tokens:
                of_experts.setdefault(name, {})[expert] = values.numpy()
    for name, each in of_experts.items():
        mean = np.mean(list(each.values()), axis=0, dtype=np.float64).astype(np.float32)
        found[name] = np.concatenate([each.get(number, mean) for number in range(expert_count(model.config))])
    if not found:
        raise Failure(f"{grams} holds no Grams: sweep the model again")
    return found


def channel_importance(diagonal: np.ndarray[Any, Any], tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns mean x² per input channel from diag(H) `[in]`, all above zero."""
    import numpy as np

    mean = np.asarray(diagonal, dtype=np.float64) / max(tokens, 1)
    floor = mean.mean() * 1e-6
    return (np.maximum(mean, floor) if floor > 0 else np.ones_like(mean)).astype(np.float32)


def quantize(f: Path, out: Path, type: str, imatrix: Importance | None = None, report: Report = silent) -> None:
    """Quantizes a GGUF file with llama.cpp, on all cores.

    Args:
        f: a GGUF file in F32, F16 or BF16.
        out: the file to write.
        type: one of TYPES that is not plain.
        imatrix: importance of every input channel by tensor name (see `importance`), or None.
        report: called for every tensor.

    Raises:
        Failure: llama.cpp failed; its own words are in the message.
    """
    library = load("GGUF quantization")
    params = library.api.llama_model_quantize_default_params()
    params.nthread = os.cpu_count() or 1
    params.ftype = TYPES[type].ftype
    # The entries point into these arrays, so they must outlive the call.
    kept = _imatrix_entries(library.api, imatrix) if imatrix else None
    if kept:
        params.imatrix = ctypes.cast(kept[0], ctypes.POINTER(library.api.llama_model_imatrix_data))
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _log(library, report) as lines:
            status = library.api.llama_model_quantize(str(f).encode(), str(partial).encode(), ctypes.byref(params))
        if status:
            reason = lines[-1] if lines else "it gave no reason"
            raise Failure(f"llama.cpp could not quantize {f.name} to {type}: {reason}")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _imatrix_entries(api: Any, imatrix: Importance) -> tuple[Any, list[Any]]:
    entries = (api.llama_model_imatrix_data * (len(imatrix) + 1))()
    kept = []
    for entry, (name, values) in zip(entries, sorted(imatrix.items()), strict=False):
        data = (ctypes.c_float * values.size).from_buffer_copy(values.tobytes())
        kept.append(data)
        entry.name, entry.size = name.encode(), values.size
        entry.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
    return entries, kept


@contextmanager
def _log(library: Library, report: Report) -> Iterator[list[str]]:
    """Yields llama.cpp's warnings and errors; its lines "[ 12/ 272] name" go to `report`."""
    lines: list[str] = []

    def receive(level: int, text: bytes, _data: Any) -> None:
        line = text.decode(errors="replace").strip()
        if found := _PROGRESS.match(line):
            report(int(found[1]), int(found[2]), found[3])
        elif level in (3, 4) and line:  # ggml's warning and error
            lines.append(line)

    callback = library.api.llama_log_callback(receive)
    library.api.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        library.api.llama_log_set(library.quiet, ctypes.c_void_p(0))


def describe(file: Path, type: str) -> dict[str, Any]:
    """Returns the facts of a GGUF file, read from it.

    `tensor_types` counts tensors by type. `bits_per_weight` is the bytes of all tensors over all their elements.
    `fallbacks` counts the matrices of a K-quant file whose rows are not a multiple of 256, and names the modules.
    llama.cpp gives them another type than the K-quant. The head (the embedding if they are tied) does not count:
    llama.cpp gives it Q8_0 then and does not call it a fallback.
    """
    from gguf import GGMLQuantizationType

    from lighten.model.gguf_header import read_header

    tensors = list(read_header(file).tensors.values())
    head = "output.weight" if any(tensor.name == "output.weight" for tensor in tensors) else "token_embd.weight"
    types = Counter(GGMLQuantizationType(tensor.type).name for tensor in tensors)
    blocks = type in TYPES and TYPES[type].fallback_bits is not None
    odd = Counter(
        tensor.name.split(".")[-2]
        for tensor in tensors
        if blocks and len(tensor.shape) > 1 and tensor.shape[-1] % K_BLOCK and tensor.name != head
    )
    bits = 8 * sum(tensor.size for tensor in tensors)
    named = {"tensors": dict(sorted(odd.items()))} if odd else {}
    return {
        "format": "gguf",
        "type": type,
        "tensor_types": dict(sorted(types.items())),
        "fallbacks": {"count": odd.total(), "of": len(tensors), **named},
        "bits_per_weight": round(bits / sum(math.prod(tensor.shape) for tensor in tensors), 4),
    }
