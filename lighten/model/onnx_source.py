"""What an ONNX file says about itself, without its weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import Failure, missing_extra, reading
from lighten.facts import ModelFacts, Task
from lighten.model.auto_classes import task_of as of_config
from lighten.model.files import read_json
from lighten.model.onnx_checks import check_genai, check_graph

GRAPH = "model.onnx"
GENAI = "genai_config.json"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
"""The two graphs of a sequence-to-sequence model."""
LARGEST = 1 << 31
"""Maximum number of bytes of a protobuf file, by its own format."""
KEY = "past_key_values."
"""Beginning of the names of a graph's cache."""
_NAMES = {1: "float32", 10: "float16", 16: "bfloat16", 2: "int8", 3: "int8"}


@dataclass(frozen=True)
class Input:
    """An input of a graph: ONNX's number of its type, and its shape, with 0 for a size that may vary."""

    kind: int
    shape: list[int]


@dataclass(frozen=True)
class Graph:
    """Inputs and outputs of a graph, and the form of its weights."""

    inputs: dict[str, Input]
    outputs: list[str]
    vocab: int
    """Number of columns of the logits; 0 if it may vary."""
    precision: str
    """Precision of most of the weights: "float32", "int4", …"""
    params: int
    domains: list[str]
    """Domains of the operators; "" is ONNX's own."""


def find_onnx(path: Path) -> Path | None:
    """Returns the .onnx file of a path: the path itself, or the file in a directory without other weights."""
    if path.is_file():
        return path if path.suffix == ".onnx" else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    if (path / GRAPH).is_file():
        return path / GRAPH
    if (path / DECODER).is_file():
        return path / DECODER
    return next(iter(sorted(path.glob("*.onnx"))), None)


def load_graph(path: Path) -> Any:
    """Returns a graph as onnx's `ModelProto`, without the weights that lie outside of it.

    Raises:
        RequestError: the package onnx is missing.
        Failure: it is no ONNX file, or holds nothing.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "onnx", "reading an ONNX file") from error
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if path.stat().st_size >= LARGEST:
            raise DecodeError("a graph has less than 2 GB, its weights in a file beside it")
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise Failure(
            f"{path} cannot be read as ONNX ({error}): cut short or damaged; export or fetch it again"
        ) from error
    if not model.graph.node:
        raise Failure(f"{path} holds no graph: cut short or damaged; export or fetch it again")
    return model


def read_graph(path: Path) -> Graph:
    """Returns the contents of a graph, after checking that all its weights exist.

    Raises:
        RequestError: the package onnx is missing, or the graph needs code or files from another place.
        Failure: it is no ONNX file, or its data file is missing or cut short.
    """
    model = load_graph(path)
    constants = {each.name: each for each in model.graph.initializer}
    check_graph(path, model)
    logits = next((each for each in model.graph.output if each.name == "logits"), None)
    shape = _shape(logits) if logits else []
    with reading(path, "export or fetch it again"):
        weights = _weights(model.graph, constants)
    precisions: Counter[str] = Counter()
    for precision, count in weights:
        precisions[precision] += count
    return Graph(
        {each.name: Input(each.type.tensor_type.elem_type, _shape(each)) for each in model.graph.input},
        [each.name for each in model.graph.output],
        shape[-1] if shape else 0,
        precisions.most_common(1)[0][0] if precisions else "float32",
        sum(precisions.values()),
        sorted({node.domain for node in model.graph.node}),
    )


def facts(path: Path) -> ModelFacts:
    """Returns the sizes of the model in an ONNX directory, from its config.json or genai_config.json.

    Raises:
        Failure: the directory has neither.
    """
    from lighten.model.checkpoint import facts_of, read_config

    graph = find_onnx(path)
    assert graph is not None
    if (graph.parent / "config.json").is_file():
        found = facts_of(read_config(graph.parent), str(graph.parent))
        return found if found.family == "causal" else _counted(found, graph)
    settings = genai(graph.parent)
    if not settings:
        raise Failure(f"{graph.parent} has no config.json and no {GENAI} beside {graph.name}: add either")
    with reading(graph.parent / GENAI, "export the model again"):
        return _facts(settings, settings["decoder"], graph)


def task_of(graph: Path) -> Task:
    """Returns what the model of a graph is for, by the config.json beside it; a graph without one is causal."""
    if not (graph.parent / "config.json").is_file():
        return "causal"
    return of_config(read_json(graph.parent / "config.json", "export the model again"))


def genai(folder: Path) -> dict[str, Any]:
    """Returns the settings of a model in genai_config.json, nothing if a directory has no such file.

    Raises:
        RequestError: the settings load code, or a file from elsewhere.
        Failure: the file is damaged.
    """
    file = folder / GENAI
    if not file.is_file():
        return {}
    settings = read_json(file, "export the model again")
    check_genai(settings, file)
    with reading(file, "export the model again"):
        return dict(settings["model"])


def ends(folder: Path) -> list[int]:
    """Returns the ids that onnxruntime-genai ends a text at; none if its settings name none."""
    value = genai(folder).get("eos_token_id")
    return [int(each) for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]


def _facts(settings: dict[str, Any], decoder: dict[str, Any], graph: Path) -> ModelFacts:
    return ModelFacts(
        architecture=str(settings["type"]),
        layers=int(decoder["num_hidden_layers"]),
        hidden=int(decoder["hidden_size"]),
        intermediate=0,
        heads=int(decoder["num_attention_heads"]),
        kv_heads=int(decoder["num_key_value_heads"]),
        head_dim=int(decoder["head_size"]),
        vocab=int(settings["vocab_size"]),
        tied=False,
        counted=read_graph(graph).params,
        context=settings.get("context_length"),
    )


def _counted(found: ModelFacts, graph: Path) -> ModelFacts:
    from dataclasses import replace

    return replace(found, counted=sum(read_graph(each).params for each in sorted(graph.parent.glob("*.onnx"))))


def _shape(value: Any) -> list[int]:
    return [int(dim.dim_value) for dim in value.type.tensor_type.shape.dim]


def _weights(graph: Any, constants: dict[str, Any]) -> list[tuple[str, int]]:
    """Returns precision and number of the weights of every constant with rows and columns."""
    found, counted = [], set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {each.name: each.i for each in node.attribute}
            if node.input[1] not in counted:
                found.append((f"int{sizes.get('bits', 4)}", sizes["K"] * sizes["N"]))
            counted |= set(node.input[1:])
        elif node.op_type == "GatherBlockQuantized":
            counted |= {node.input[0], *node.input[2:]}
    for name, constant in constants.items():
        if name not in counted and len(constant.dims) > 1 and constant.data_type in _NAMES and "_cache" not in name:
            found.append((_NAMES[constant.data_type], math.prod(constant.dims)))
    return found
