"""ggml's own rounding of a matrix, and its inverse, through llama.cpp's library."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from lighten.model.llama_library import load

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@cache
def _library() -> ctypes.CDLL:
    library = load("GGUF quantization").ggml
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


@cache
def _reader(type: str) -> Any:
    """Returns ggml's function that turns packed rows of a type into floats."""
    function = _library()[f"dequantize_row_{type if type.endswith('K') else type.lower()}".replace("_Q", "_q")]
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    return function


def quantize(weight: Floats, type: str, importance: Floats) -> Bytes:
    """Returns the packed rows of a matrix, uint8 `[out, bytes of a row]`, as llama.cpp's quantizer makes them.

    Args:
        weight: `[out, in]`, C order.
        type: a ggml type whose blocks fit the rows.
        importance: of every input channel, `[in]`.
    """
    import numpy as np
    from gguf import GGMLQuantizationType

    from lighten.export.gguf.write import tensor_bytes

    rows, width = weight.shape
    packed = np.empty((rows, tensor_bytes((width,), type)), dtype=np.uint8)
    source, scales = np.ascontiguousarray(weight, dtype=np.float32), np.ascontiguousarray(importance, dtype=np.float32)
    _library().ggml_quantize_chunk(
        GGMLQuantizationType[type], source.ctypes.data, packed.ctypes.data, 0, rows, width, scales.ctypes.data
    )
    return packed


def dequantize(packed: Bytes, type: str, width: int) -> Floats:
    """Returns the floats `[out, in]` of packed rows `[out, bytes of a row]`."""
    import numpy as np

    if type == "F16":
        return packed.view(np.float16).astype(np.float32)
    weight = np.empty((packed.shape[0], width), dtype=np.float32)
    _reader(type)(packed.ctypes.data, weight.ctypes.data, weight.size)
    return weight
