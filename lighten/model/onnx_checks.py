"""What an ONNX directory may ask of its runtimes: no library, no operator and no file from another place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.model.files import plain

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
"""Domains of the operators that onnxruntime has itself."""
FOREIGN = ("EPContext", "PythonOp", "PythonOpGrad", "ATen", "Aten")
"""Operators that stand for code or compiled graphs of other libraries."""
PROVIDERS = ("cpu", "cuda", "dml", "webgpu", "nvtensorrtrtx")
AXES = 32
DEPTH = 20
_WIDTHS = {1: 32, 4: 16, 5: 16, 6: 32, 7: 64, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 21: 4, 22: 4}
"""Bits of an element, by ONNX's number of its type. Other types have at most 8."""

_TENSOR = re.compile(r"[\w./:-]{0,100}(%d[\w./:-]{0,100})?", re.ASCII)
"""A tensor's name, or what such names are printed by: with one number and nothing else."""
_WORD = re.compile(r"[\w-]{1,40}", re.ASCII)
_SETTING = re.compile(r"[0-9.]{1,20}|true|false|disabled", re.ASCII)
_TEXTS = {
    "type": _WORD,
    "log_id": _WORD,
    "layer_types": _WORD,
    "graph_optimization_level": _WORD,
    "optimization.disable_specified_optimizers": re.compile(r"[\w,]{1,200}", re.ASCII),
    "ep.cuda.fpa_intb_gemm": _SETTING,
    "session.use_device_allocator_for_initializers": _SETTING,
}
"""Keys that may have a text in genai_config.json, at any place. Numbers lead to no file and no library."""


def check_genai(settings: dict[str, Any], file: Path) -> None:
    """Checks that a genai_config.json asks for nothing but arithmetic on the files beside it.

    onnxruntime-genai loads any library that `custom_ops_library` or an option of a provider names.

    Raises:
        RequestError: it has a key that is not known to be harmless; the message names it.
    """
    for path, value in _texts(settings, (), file):
        key, where = path[-1], ".".join(path)
        if key == "filename":
            plain(value, file.parent, file.name)
        elif "provider_options" in path:
            if not _SETTING.fullmatch(value):
                _refuse(where, value, file)
        elif not (_TENSOR if {"inputs", "outputs"} & set(path[:-1]) else _TEXTS.get(key, _NOTHING)).fullmatch(value):
            _refuse(where, value, file)


_NOTHING = re.compile(r"(?!)")


def _refuse(where: str, value: str, file: Path) -> None:
    raise RequestError(
        f"{file} sets {where[:200]} to {value[:80]!r}, which lighten does not hand to onnxruntime-genai: such settings "
        "can load code. Take it out if the model does without it, or export the model again"
    )


def _texts(value: Any, path: tuple[str, ...], file: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields every text with the keys that lead to it, and the names of providers without options."""
    if len(path) > DEPTH:
        raise RequestError(f"{file} is nested too deep: export the model again")
    if isinstance(value, dict):
        for key, each in value.items():
            if path and path[-1] == "provider_options" and key.lower() not in PROVIDERS:
                _refuse(".".join((*path, key)), str(each), file)
            yield from _texts(each, (*path, key), file)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, path, file)
    elif isinstance(value, str):
        yield path or ("",), value


def check_graph(path: Path, model: Any) -> None:
    """Checks that a graph has onnxruntime's own operators only, and that all its weights are beside it.

    Raises:
        RequestError: it needs operators of a library, or weights in another place.
        Failure: a file of weights is missing or too short, or the graph is damaged.
    """
    own = {(function.domain, function.name) for function in model.functions}
    graphs = [model.graph, *(graph for info in model.training_info for graph in (info.initialization, info.algorithm))]
    ends: dict[Path, int] = {}
    for part in [*graphs, *model.functions]:
        for node, tensor in _parts(part):
            if node is not None:
                if node.domain not in DOMAINS and (node.domain, node.op_type) not in own:
                    raise RequestError(
                        f"{path} needs the operator {node.op_type[:60]} of {node.domain[:60]!r}, which is code of its "
                        "own that would have to be loaded: export the model with ONNX's or onnxruntime's operators"
                    )
                if node.op_type in FOREIGN:
                    raise RequestError(f"{path} needs the operator {node.op_type}, which runs what lies outside of it")
            elif tensor is not None:
                _check_tensor(path, tensor, ends)
    for file, end in ends.items():
        if not file.is_file():
            raise Failure(f"{path} keeps its weights in {file.name}, which is missing: copy it to {path.parent}")
        if (has := file.stat().st_size) < end:
            raise Failure(f"{file} has {has:,} bytes of the {end:,} that {path.name} needs: cut short; copy it again")


def _check_tensor(path: Path, tensor: Any, ends: dict[Path, int]) -> None:
    """Notes in `ends` the last byte that a tensor needs of its file."""
    if len(tensor.dims) > AXES or any(size < 0 for size in tensor.dims):
        raise Failure(f"{path}: the constant {tensor.name[:80]} has an impossible shape: damaged; fetch it again")
    if tensor.data_location != 1:
        return
    entry = {each.key: each.value for each in tensor.external_data}
    file = plain(entry.get("location"), path.parent, path.name)
    offset, length = (_count(entry.get(key), path, tensor.name) for key in ("offset", "length"))
    needed = -(-math.prod(tensor.dims) * _WIDTHS.get(tensor.data_type, 8) // 8)
    ends[file] = max(ends.get(file, 0), offset + (length or needed))


def _count(text: str | None, path: Path, name: str) -> int:
    if text is None:
        return 0
    if not re.fullmatch("[0-9]{1,18}", text):
        raise Failure(f"{path}: the place of {name[:80]} is {text[:40]!r}, no number: damaged; fetch it again")
    return int(text)


def _parts(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every node and every constant (the other is None) of a graph or function, and of its inner graphs."""
    for tensor in getattr(graph, "initializer", ()):
        yield None, tensor
    yield from _sparse(getattr(graph, "sparse_initializer", ()))
    for node in graph.node:
        yield node, None
        for each in node.attribute:
            for tensor in [*([each.t] if each.HasField("t") else []), *each.tensors]:
                yield None, tensor
            yield from _sparse(
                [*([each.sparse_tensor] if each.HasField("sparse_tensor") else []), *each.sparse_tensors]
            )
            for inner in [*([each.g] if each.HasField("g") else []), *each.graphs]:
                yield from _parts(inner)


def _sparse(found: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for each in found:
        yield None, each.values
        yield None, each.indices
