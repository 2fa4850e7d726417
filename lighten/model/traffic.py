"""The bytes that a runtime reads and the operations that it does for a token, from an artifact's own headers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import Failure, reading
from lighten.facts import ModelFacts
from lighten.model.anatomy import EMBEDDINGS, HEADS

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
LARGEST_HEADER = 100_000_000
"""Maximum number of bytes of a safetensors header, by its own format."""
_AXES = 16
ONNX_CACHE_BITS = {1: 32, 10: 16, 16: 16}
"""Bits of a key or value, by ONNX's number of the type."""
WIDTHS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Bits of an element, by ONNX's number of its type. Other types count as 8."""


@dataclass(frozen=True)
class Traffic:
    """The traffic of one decoding step: bytes of weights, and the numbers that the rest follows from."""

    weights: int
    """Bytes of weights that a step reads. An embedding that is not the head counts with one row."""
    products: int
    """Number of weights that every token is multiplied with, without those of the head."""
    head: int
    """Number of weights of the head."""
    attention: int
    """Number of operations of attention for each token of the context."""
    cache_bytes: int
    """Bytes of keys and values of a token of the context."""


def traffic(path: Path, facts: ModelFacts, dtype: str) -> Traffic:
    """Returns the traffic of an artifact: a model directory, a .gguf file or its directory, an ONNX directory.

    Args:
        path: the artifact.
        facts: its sizes.
        dtype: arithmetic that a model directory is opened with; its floating-point weights are read in it.

    Raises:
        Failure: a header cannot be read, or there are no weights of a known format.
    """
    from lighten.model.onnx_source import find_onnx

    bits = 32 if dtype == "float32" else 16
    if graph := find_onnx(path):
        weights, bits = _onnx(graph)
    elif gguf := _gguf_files(path):
        weights, bits = gguf_reads(gguf), 16
    else:
        weights = _safetensors(path, bits // 8)
    if not weights:
        raise Failure(f"what a token reads of {path} is not known: it holds no weights in files that can be read here")
    head = facts.vocab * facts.hidden
    linear = facts.layers * facts.layer_linear_params
    if facts.counted is not None and not facts.intermediate:  # the sizes do not tell: what was counted, less the head
        linear = max(0, facts.counted - head)
    return Traffic(weights, linear, head, 4 * facts.layers * facts.heads * facts.head_dim, facts.cache_bytes(1, bits))


def _gguf_files(path: Path) -> list[Path]:
    from lighten.model.gguf_header import is_gguf, parts, within

    if path.is_file():
        return parts(path) if is_gguf(path) else []
    first = within(path)
    return parts(first) if first else []


def gguf_reads(paths: Iterable[Path]) -> int:
    """Returns the bytes of weights that decoding a token reads from the files of a GGUF model."""
    from lighten.model.gguf_header import read_header

    tensors = {name: tensor for path in paths for name, tensor in read_header(path).tensors.items()}
    read = 0.0
    for name, tensor in tensors.items():
        rows = tensor.shape[0] if name == "token_embd.weight" and "output.weight" in tensors else 1
        read += tensor.size / rows
    return round(read)


def _safetensors(path: Path, width: int) -> int:
    """Returns bytes read from a model directory; floating-point weights have `width` bytes once they are loaded."""
    headers = {file: _header(file) for file in sorted(path.glob("*.safetensors"))}
    own_head = any(name.partition(".")[0] in HEADS for header in headers.values() for name in header)
    read = 0.0
    for file, header in headers.items():
        with reading(file, "make or fetch it again"):
            for name, entry in header.items():
                begin, end = (int(place) for place in entry["data_offsets"])
                shape = [int(size) for size in entry["shape"][:_AXES]]
                size = math.prod(shape) * width if entry["dtype"] in FLOATS else end - begin
                read += size / (max(1, shape[0]) if own_head and name.endswith(EMBEDDINGS) else 1)
    return round(read)


def _header(file: Path) -> dict[str, Any]:
    """Returns the entries of a safetensors file's tensors, without opening its data."""
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if not 0 < length <= min(LARGEST_HEADER, file.stat().st_size):
                raise ValueError(f"its header would have {length:,} bytes")
            found: Any = json.loads(data.read(length))
        if not isinstance(found, dict):
            raise ValueError("its header is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(f"{file} cannot be read ({error}): cut short or damaged; make or fetch it again") from error
    return {str(name): entry for name, entry in found.items() if name != "__metadata__"}


def _onnx(path: Path) -> tuple[int, int]:
    """Returns the bytes of weights that a step of a graph reads, and the bits of its keys and values."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    users: dict[str, list[tuple[str, int]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            users.setdefault(name, []).append((node.op_type, position))
    read = 0.0
    for each in graph.initializer:
        size = math.prod(each.dims) * WIDTHS.get(each.data_type, 8) / 8
        looked_up = all(_gathers(operator, position) for operator, position in users.get(each.name, [("", 0)]))
        read += size / max(1, each.dims[0]) if looked_up and each.dims else size
    cached = [each.type.tensor_type.elem_type for each in graph.input if each.name.startswith("past_key_values.")]
    return round(read), ONNX_CACHE_BITS.get(cached[0], 16) if cached else 16


def _gathers(operator: str, position: int) -> bool:
    """Whether an operator takes single rows of this input, such as an embedding or a table of positions."""
    return (operator == "Gather" and position == 0) or (operator == "GatherBlockQuantized" and position != 1)
