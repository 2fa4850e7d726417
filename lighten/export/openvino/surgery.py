"""Changes to an OpenVINO graph: codes in the place of the weights of products and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from lighten.export.openvino.weights import Stored

PORTS = {"MatMul": 1, "Gather": 0}
"""Input of an operator that is its weight."""


class Surgery:
    """A graph that is being changed. Its constants share their memory with a model, which tells their names."""

    def __init__(self, graph: Any, model: nn.Module) -> None:
        self.graph = graph
        self.names = _names(model)
        """Names of the linears and embeddings, by the place of their weights in memory. Tied ones have several."""
        self._users: dict[int, list[Any]] = {}
        for node in graph.get_ordered_ops():
            if (place := _place(node)) in self.names:
                self._users.setdefault(place, []).append(node)
        self._orders: dict[tuple[str, int, bytes], Any] = {}

    def weights(self) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yields the place, the names and the operators of every weight that can be replaced, in order."""
        for place, users in self._users.items():
            if all(_turned(node) for node in users):
                yield place, self.names[place], [node.get_type_name() for node in users]

    def replace(self, place: int, stored: Stored) -> None:
        """Puts codes in the place of a weight, for all its users."""
        made = decompressed(stored)
        made.get_node().set_friendly_name(self.names[place][0])
        for node in self._users[place]:
            node.input(PORTS[node.get_type_name()]).replace_source_output(made)
            if stored.order is not None:
                node.input(0).replace_source_output(self._ordered(node.input_value(0), stored.order))

    def _ordered(self, value: Any, order: torch.Tensor) -> Any:
        """Returns the inputs of a product in the order of its groups, the same for all products that share both."""
        import openvino.opset13 as ops

        key = value.get_node().get_name(), value.get_index(), order.numpy().tobytes()
        if key not in self._orders:
            places = ops.constant(order.numpy().astype(np.int32))
            self._orders[key] = ops.gather(value, places, ops.constant(np.int32(-1))).output(0)
        return self._orders[key]


def decompressed(stored: Stored) -> Any:
    """Returns the output of a subgraph that unpacks a weight to float32 `[out, in]`.

    Its operators are in the order that the plugins know: codes, zero points, scales, the shape, the type.
    """
    import openvino.opset13 as ops

    half = stored.scales.dtype == torch.float16
    kind = "f16" if half else "f32"
    grouped = stored.codes.shape[1] > 1
    value = ops.convert(_codes(stored.codes if grouped else stored.codes[:, 0], stored.bits), kind)
    if stored.zeros is not None:
        zeros = stored.zeros if grouped else stored.zeros[:, 0]
        value = ops.subtract(value, ops.convert(_codes(zeros, stored.bits), kind))
    scales = stored.scales if grouped else stored.scales[:, 0]
    value = ops.multiply(value, ops.constant(scales.numpy()))
    if grouped:
        shape = np.array([len(stored.codes), stored.codes[0].numel()], np.int64)
        value = ops.reshape(value, ops.constant(shape), special_zero=False)
    return (ops.convert(value, "f32") if half else value).output(0)


def _codes(codes: torch.Tensor, bits: int) -> Any:
    """Returns codes as a constant of their width."""
    import openvino as ov
    import openvino.opset13 as ops

    signed = codes.dtype == torch.int8
    if bits == 8:
        return ops.constant(codes.contiguous().numpy())
    flat = (codes.contiguous().view(torch.uint8) & 15).flatten()
    pairs = nn.functional.pad(flat, (0, len(flat) % 2)).view(-1, 2)
    # a tensor over an array would borrow its memory
    tensor = ov.Tensor(ov.Type.i4 if signed else ov.Type.u4, ov.Shape(list(codes.shape)))
    tensor.data.reshape(-1)[:] = (pairs[:, 0] | pairs[:, 1] << 4).numpy()
    return ops.constant(tensor)


def _names(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            found.setdefault(module.weight.data_ptr(), []).append(name)
    return found


def _place(node: Any) -> int:
    """Returns the place in memory of the constant that is the weight of an operator; 0 if it has none."""
    port = PORTS.get(node.get_type_name())
    if port is None:
        return 0
    source = node.input_value(port).get_node()
    while source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    if source.get_type_name() != "Constant":
        return 0
    return int(source.data.ctypes.data)


def _turned(node: Any) -> bool:
    """Returns whether an operator takes its weight as `[out, in]`: a product with it turned, or rows of a table."""
    if node.get_type_name() == "MatMul":
        attributes = node.get_attributes()
        return bool(attributes["transpose_b"]) and not attributes["transpose_a"]
    return True
