"""What a graph asks of TensorRT that its ONNX parser does not take. Nothing is built, and nothing is run.

TensorRT's own parser needs an NVIDIA GPU, so a table answers: operators, and the types of their first input, of
TensorRT 10.15, by docs/operators.md of github.com/onnx/onnx-tensorrt. It has ONNX's own operators only. What that page
says about attributes and about inputs that must be constants is not checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.model.onnx_source import load_graph

TABLE = "the operator table of TensorRT 10.15"
OPSETS = range(9, 25)
"""Versions of ONNX's own operators that TensorRT 10.15 takes."""
_FLOATS = "FLOAT FLOAT16 BFLOAT16"
_NUMBERS = f"{_FLOATS} INT32 INT64"
_ROWS = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization "
        "PRelu ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform "
        "RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax "
        "Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul "
        "Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    (
        f"{_NUMBERS} BOOL",
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence "
        "Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (f"{_NUMBERS} BOOL UINT8", "Cast CastLike"),
    (f"{_NUMBERS} BOOL INT4 FLOAT8E4M3FN FLOAT4E2M1", "Constant ConstantOfShape"),
    (f"{_NUMBERS} FLOAT8E4M3FN", "Mean"),
    (f"{_NUMBERS} INT8", "Gelu"),
    (f"{_FLOATS} INT32", "TensorScatter"),
    (f"{_FLOATS} INT8 FLOAT8E4M3FN", "Attention"),
    ("INT8 INT4 FLOAT8E4M3FN FLOAT4E2M1", "DequantizeLinear"),
    ("FLOAT FLOAT16", "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    ("FLOAT", "STFT"),
    ("BOOL", "And Not Or Xor"),
    ("", "BlackmanWindow HammingWindow HannWindow"),  # the table has the types of their outputs
)
TAKES = {operator: frozenset(types.split()) for types, operators in _ROWS for operator in operators.split()}
"""ONNX's own operators that TensorRT takes, and the types of their first input; none: any."""


def facts(graphs: Sequence[Path]) -> dict[str, Any]:
    """Returns whether TensorRT takes all graphs of a model, what it lacks, most often first, and who says so.

    Raises:
        Failure: a graph is damaged.
    """
    lacks = sum((lacking(load_graph(path)) for path in graphs), Counter[str]())
    listed = [f"{name} ×{count}" for name, count in lacks.most_common()]
    return {"supported": not lacks, "lacks": listed, "checked_with": TABLE}


def lacking(model: Any) -> Counter[str]:
    """Returns what the table lacks of a model (a `ModelProto`): operators, with the type where only that is not taken.

    Inner graphs and the bodies of the model's own functions are looked into; a call of such a function is no operator.
    """
    own = {(function.domain, function.name) for function in model.functions}
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    found = Counter(f"opset {version}" for version in versions if version not in OPSETS)
    bodies = [(model.graph.node, _types(model.graph)), *((function.node, {}) for function in model.functions)]
    for nodes, types in bodies:
        for node, kind in _nodes(nodes, types):
            if (node.domain, node.op_type) in own:
                continue
            takes = TAKES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if takes is None:
                found[_name(node)] += 1
            elif kind and takes and kind not in takes:
                found[f"{_name(node)} of {kind}"] += 1
    return found


def _name(node: Any) -> str:
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _nodes(nodes: Iterable[Any], types: Mapping[str, str]) -> Iterator[tuple[Any, str | None]]:
    """Yields every node, those of inner graphs too, and the type of its first input where the graph tells it."""
    for node in nodes:
        yield node, types.get(node.input[0]) if node.input else None
        for each in node.attribute:
            for inner in [*([each.g] if each.HasField("g") else []), *each.graphs]:
                yield from _nodes(inner.node, {**types, **_types(inner)})


def _types(graph: Any) -> dict[str, str]:
    """Returns the types of the values of a graph. TensorRT reads DOUBLE as FLOAT."""
    from onnx import TensorProto

    names = {number: "FLOAT" if name == "DOUBLE" else name for name, number in TensorProto.DataType.items()}
    found = {
        each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output, *graph.value_info)
    } | {each.name: each.data_type for each in graph.initializer}
    return {name: names.get(kind, f"type {kind}") for name, kind in found.items() if kind}
