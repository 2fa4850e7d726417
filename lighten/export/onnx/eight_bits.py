"""Rounds the weights of a plain graph to 8 bits, with standard operators only.

Products: a scale for each output of the weights, by onnxruntime; their inputs are rounded as they come. Before that,
each position is divided by its own largest number, and the product is multiplied by it again. Without it all positions
of a batch would share one scale, and one large position would leave a few steps to the others.

Embeddings: a scale for each row.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.export.onnx.quiet import quiet

ROWS = 256
"""Tables of fewer rows stay as they are: they are small, and every token reads them."""
LARGEST = 127
SMALLEST = 1e-12
"""Minimum divisor of a position."""


def round_weights(path: Path, *, embeddings: bool = True) -> None:
    """Rounds the weights of products, and of `embeddings`, to 8 bits.

    `DynamicQuantizeLinear` and `MatMulInteger` are operators of ONNX itself.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = path.with_name(f"rounded-{path.name}")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with quiet():
            quantize_dynamic(
                path,
                rounded,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        root.setLevel(level)
    _rewrite(rounded, path, embeddings)


def _rewrite(source: Path, target: Path, embeddings: bool) -> None:
    """Writes a graph again under the name `target`, and removes the old one."""
    import onnx_ir as ir

    model = ir.load(source)
    for unused in [domain for domain in model.opset_imports if domain and not _uses(model, domain)]:
        del model.opset_imports[unused]
    _scale_positions(model.graph)
    if embeddings:
        _round_tables(model.graph)
    kept = target.with_name(f"again-{target.name}")
    ir.save(model, kept, external_data=f"{target.name}.again", size_threshold_bytes=256)
    model = ir.load(kept)
    target.with_name(f"{target.name}.data").unlink(missing_ok=True)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=256)
    for file in (source, source.with_name(f"{source.name}.data"), kept, target.with_name(f"{target.name}.again")):
        file.unlink(missing_ok=True)


def _uses(model: Any, domain: str) -> bool:
    return any(node.domain == domain for node in model.graph)


def _constant(graph: Any, name: str, value: NDArray[Any]) -> Any:
    import onnx_ir as ir

    tensor = ir.Tensor(value, name=name)
    found = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(found)
    return found


def _scale_positions(graph: Any) -> None:
    """Divides the inputs of rounded products by the largest number of each position, and multiplies the products."""
    import onnx_ir as ir

    rounding = [node for node in graph if node.op_type == "DynamicQuantizeLinear"]
    if not rounding:
        return
    last = _constant(graph, "last_axis", np.array([-1], np.int64))
    least = _constant(graph, "least_of_a_position", np.array(SMALLEST, np.float32))
    for node in rounding:
        entering, rounded = node.inputs[0], node.outputs[0]
        size = ir.Node("", "Abs", [entering], name=f"{entering.name}_size")
        largest = ir.Node("", "ReduceMax", [size.outputs[0], last], name=f"{entering.name}_largest")
        divisor = ir.Node("", "Max", [largest.outputs[0], least], name=f"{entering.name}_divisor")
        divided = ir.Node("", "Div", [entering, divisor.outputs[0]], name=f"{entering.name}_divided")
        graph.insert_before(node, [size, largest, divisor, divided])
        node.replace_input_with(0, divided.outputs[0])
        for product in rounded.consumers():
            (cast,) = product.outputs[0].consumers()
            (scaled,) = cast.outputs[0].consumers()
            _multiply(graph, scaled, divisor.outputs[0])


def _multiply(graph: Any, node: Any, factor: Any) -> None:
    """Multiplies the output of a node, under its own name."""
    import onnx_ir as ir

    old = node.outputs[0]
    again = ir.Node("", "Mul", [old, factor], name=f"{node.name}_again")
    graph.insert_after(node, [again])
    new = again.outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    again.replace_input_with(0, old)
    new.name, old.name = old.name, f"{old.name}_divided"


def _round_tables(graph: Any) -> None:
    """Rounds the tables that rows are taken from, with a scale for each row."""
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        users = value.consumers()
        wide = value.dtype == ir.DataType.FLOAT and len(value.shape or ()) == 2 and value.shape[0] >= ROWS
        if not (wide and users and all(_takes_rows(node, value) for node in users)):
            continue
        table = value.const_value.numpy()
        scale = np.abs(table).max(1, keepdims=True).astype(np.float32) / LARGEST
        scale[scale == 0] = 1.0
        whole = _constant(graph, f"{name}_rounded", np.rint(table / scale).astype(np.int8))
        scales = _constant(graph, f"{name}_scale", scale)
        for node in users:
            taken = ir.Node("", "Gather", [whole, node.inputs[1]], name=f"{node.name}_rounded")
            to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
            wide_rows = ir.Node("", "Cast", [taken.outputs[0]], [to], name=f"{node.name}_cast")
            by = ir.Node("", "Gather", [scales, node.inputs[1]], name=f"{node.name}_scale")
            made = ir.Node("", "Mul", [wide_rows.outputs[0], by.outputs[0]], name=f"{node.name}_row")
            graph.insert_before(node, [taken, wide_rows, by, made])
            old, new = node.outputs[0], made.outputs[0]
            new.shape, new.type, label = old.shape, old.type, old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            new.name = label
        del graph.initializers[name]


def _takes_rows(node: Any, table: Any) -> bool:
    """Returns whether a node takes rows of a table by their numbers."""
    axis = node.attributes.get("axis")
    return bool(node.op_type == "Gather" and node.inputs[0] is table and (axis is None or axis.as_int() == 0))
