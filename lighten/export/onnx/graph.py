"""Changes to a graph of onnxruntime-genai's builder: other weights for products, embedding and head."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lighten.errors import Failure
from lighten.export.onnx.weights import Packed, rounded

MICROSOFT = "com.microsoft"
HEAD = "/lm_head/MatMul"


class Surgery:
    """A graph that is being changed."""

    def __init__(self, model: ir.Model, accuracy_level: int) -> None:
        self.graph = model.graph
        self.accuracy_level = accuracy_level
        self._nodes = {str(node.name): node for node in self.graph}
        self._orders: dict[tuple[str, bytes], ir.Value] = {}

    def products(self) -> list[str]:
        """Returns the names of the products with a constant, in order."""
        return [name for name, node in self._nodes.items() if node.op_type == "MatMul"]

    def replace(self, name: str, packed: Packed) -> None:
        """Puts a `MatMulNBits` in place of a product."""
        node = self._nodes[name]
        entering, old, output = node.inputs[0], node.inputs[1], node.outputs[0]
        assert entering is not None and old is not None
        shape = None if old.shape is None else old.shape.numpy()
        if shape is not None and tuple(shape) != (packed.inputs, packed.outputs):
            raise Failure(f"{name} is a product with {tuple(shape)}, its weights are {packed.inputs, packed.outputs}")
        prefix = name[1:].replace("/", ".")
        if packed.order is not None:
            entering = self._ordered(entering, packed.order, node)
        inputs: list[ir.Value | None] = [entering, *self._constants(prefix, packed, old.dtype)]
        attributes = {
            "K": packed.inputs,
            "N": packed.outputs,
            "bits": packed.bits,
            "block_size": packed.block_size,
            "accuracy_level": self.accuracy_level,
        }
        made = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, num_outputs=1, name=f"{name}NBits")
        self._swap(node, made, output)
        if not old.uses():
            del self.graph.initializers[str(old.name)]

    def scale_embedding(self, exact: float) -> None:
        """Gives the factor of the embedding all its digits, if the builder wrote it with two, as it does for Gemma."""
        node = self._nodes.get("/model/embed_tokens/Mul")
        old = node.inputs[1] if node is not None else None
        found = ir.convenience.get_const_tensor(old) if old is not None else None
        if node is None or old is None or found is None or abs(float(found.numpy()) - exact) > 0.0051:
            return
        value = np.array(exact, dtype=found.dtype.numpy())
        node.replace_input_with(1, self._constant("embedding.scale", value))

    def embed(self, kind: str, block_size: int) -> dict[str, Any]:
        """Gives embedding and head a precision. Returns facts about their bytes.

        The head keeps the weights of `replace`. Embedding and head are one constant if the builder made them so.
        """
        lookup = next(
            (node for name, node in self._nodes.items() if name.startswith("/model/embed_tokens/Gather")), None
        )
        if lookup is None:
            raise Failure("the builder's graph has no embedding")
        head = self._nodes[HEAD] if HEAD in self._nodes and self._nodes[HEAD].graph is not None else None
        if lookup.op_type == "Gather" and kind != "float":
            self._round(lookup, head, {"int4": 4, "int8": 8}[kind], block_size)
        return self._facts(kind)

    def _round(self, lookup: ir.Node, head: ir.Node | None, bits: int, block_size: int) -> None:
        table = lookup.inputs[0]
        assert table is not None
        turned = table.producer()
        stored = turned.inputs[0] if turned is not None else table
        assert stored is not None and stored.const_value is not None
        weight = torch.from_numpy(np.array(stored.const_value.numpy(), dtype=np.float32))
        packed = rounded(weight.t() if turned is not None else weight, bits, block_size)
        shared = turned is not None and head is not None and head.inputs[1] is stored
        dtype = stored.dtype
        if head is not None:
            if shared:
                self.replace(HEAD, packed)
            else:
                value = head.inputs[1]
                assert value is not None and value.const_value is not None
                own = torch.from_numpy(np.array(value.const_value.numpy(), dtype=np.float32))
                self.replace(HEAD, rounded(own.t(), bits, block_size))
        prefix = "lm_head.MatMul" if shared else "model.embed_tokens"
        if shared:
            blocks, scales = (self.graph.initializers[f"{prefix}.{part}"] for part in ("blocks", "scales"))
        else:
            blocks, scales = self._constants(prefix, packed, dtype)
        ids, output = lookup.inputs[1], lookup.outputs[0]
        rows, width = packed.outputs, packed.blocks[0].numel() * 8 // bits
        shape = self._constant("model.embed_tokens.shape", np.array([rows, packed.blocks[0].numel()]))
        flat = ir.node("Reshape", [blocks, shape], name="/model/embed_tokens/Reshape")
        self.graph.insert_before(lookup, flat)
        attributes = {"bits": bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 1}
        name = "/model/embed_tokens/GatherBlockQuantized"
        made = ir.node("GatherBlockQuantized", [flat.outputs[0], ids, scales], attributes, domain=MICROSOFT, name=name)
        if width != packed.inputs:
            self.graph.insert_before(lookup, made)
            made.outputs[0].dtype = output.dtype
            bounds = [
                self._constant(f"model.embed_tokens.{end}", np.array([at]))
                for end, at in (("start", 0), ("end", packed.inputs), ("axis", -1))
            ]
            made = ir.node("Slice", [made.outputs[0], *bounds], name="/model/embed_tokens/Slice")
        self._swap(lookup, made, output)
        if turned is not None and not turned.outputs[0].uses():
            self.graph.remove(turned, safe=True)
        if not stored.uses() and stored.name in self.graph.initializers:
            del self.graph.initializers[str(stored.name)]

    def _facts(self, kind: str) -> dict[str, Any]:
        """Returns precision and bytes of embedding and head, and how many more these are than 4 bits, blocks of 32."""
        words = ("lm_head.", "model.embed_tokens.")
        values = [value for name, value in self.graph.initializers.items() if name.startswith(words)]
        size = sum(value.const_value.nbytes for value in values if value.const_value is not None)
        rows = sum(_weights(value, kind) for value in values)
        return {"embedding": kind, "embedding_bytes": size, "embedding_over_int4_bytes": size - rows * 5 // 8}

    def _ordered(self, value: ir.Value, order: torch.Tensor, before: ir.Node) -> ir.Value:
        """Returns the inputs of a product in the order of its groups."""
        key = str(value.name), order.numpy().tobytes()
        if key not in self._orders:
            places = self._constant(f"order.{len(self._orders)}", order.numpy())
            name = f"/order.{len(self._orders)}/Gather"
            made = ir.node("Gather", [value, places], {"axis": -1}, name=name)
            made.outputs[0].dtype = value.dtype
            made.outputs[0].name = f"{name}/output_0"
            self.graph.insert_before(before, made)
            self._orders[key] = made.outputs[0]
        return self._orders[key]

    def _constants(self, prefix: str, packed: Packed, dtype: ir.DataType | None) -> list[ir.Value]:
        kind = (dtype or ir.DataType.FLOAT).numpy()
        values = [
            self._constant(f"{prefix}.blocks", packed.blocks.numpy()),
            self._constant(f"{prefix}.scales", packed.scales.numpy().astype(kind)),
        ]
        if packed.zeros is not None:
            values.append(self._constant(f"{prefix}.zeros", packed.zeros.numpy()))
        return values

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def _swap(self, old: ir.Node, new: ir.Node, output: ir.Value) -> None:
        """Puts a node in place of another. Its output takes over name, type and users."""
        ir.convenience.replace_nodes_and_values(self.graph, old, [old], [new], [output], [new.outputs[0]])


def _weights(value: ir.Value, kind: str) -> int:
    """Returns the number of weights of a constant of the embedding or the head."""
    if value.const_value is None or len(value.const_value.shape) < 2:
        return 0
    count = int(np.prod(value.const_value.shape.numpy()))
    if value.const_value.dtype == ir.DataType.UINT8:
        return count * 2 if kind == "int4" else count
    return 0 if str(value.name).endswith(("scales", "scale")) else count
