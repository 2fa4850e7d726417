"""Rounding of plain graphs to 8 bits, on graphs made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lighten.export.onnx.eight_bits import ROWS, round_weights
from lighten.export.onnx.plain import open_session

WIDE = 32
Arrays = dict[str, NDArray[Any]]


def graph(path: Path, nodes: list[Any], weights: Arrays, entering: list[Any], leaving: list[str]) -> Path:
    """Writes a graph whose outputs have three axes."""
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "l", None]) for name in leaving]
    made = helper.make_graph(
        nodes, "model", entering, outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def product(path: Path, weight: NDArray[np.float32]) -> Path:
    """Writes a graph of one product, whose output leaves the graph and is also read inside it."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    return graph(
        path,
        nodes,
        {"w": weight},
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "l", WIDE])],
        ["y", "z"],
    )


def test_a_large_position_takes_nothing_from_the_others(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    weight = chance.normal(size=(WIDE, 48)).astype(np.float32)
    path = product(tmp_path / "model.onnx", weight)
    round_weights(path)
    onnx.checker.check_model(path)
    given = chance.normal(size=(3, 5, WIDE)).astype(np.float32)
    given[1, 2] *= 1000
    given[2, 4] = 0
    found, negative = open_session(path).run(None, {"x": given})
    wanted = given @ weight
    off = np.linalg.norm(found - wanted, axis=-1)
    size = np.linalg.norm(wanted, axis=-1)
    assert (off[size > 0] / size[size > 0]).max() < 0.02
    assert (found[2, 4] == 0).all()
    assert np.array_equal(negative, -found)


def gathered(path: Path, table: NDArray[np.float32], *extra: Any) -> Path:
    """Writes a graph that takes rows of a table."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0), *extra]
    return graph(
        path, nodes, {"table": table}, [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "l"])], ["rows"]
    )


def tables(path: Path) -> dict[str, int]:
    """Returns the types of the weights of a graph with two axes."""
    return {each.name: each.data_type for each in onnx.load(path).graph.initializer if len(each.dims) == 2}


def test_a_table_has_a_scale_for_each_row(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    table = chance.normal(size=(ROWS, WIDE)).astype(np.float32) * chance.uniform(0.01, 100, (ROWS, 1)).astype("f4")
    table[9] = 0
    path = gathered(tmp_path / "model.onnx", table)
    round_weights(path)
    ids = np.array([[0, 9, 200], [255, 1, 1]])
    (found,) = open_session(path).run(None, {"ids": ids})
    steps = np.abs(table[ids]).max(-1, keepdims=True) / 127
    assert (np.abs(found - table[ids]) <= 0.501 * steps).all()
    assert TensorProto.INT8 in tables(path).values()
    assert "table" not in tables(path)


@pytest.mark.parametrize("why", ["asked for", "few rows", "read as a whole"])
def test_a_table_stays(tmp_path: Path, why: str) -> None:
    table = np.random.default_rng(2).normal(size=(ROWS - (why == "few rows"), WIDE)).astype(np.float32)
    extra = [helper.make_node("Neg", ["table"], ["other"])] if why == "read as a whole" else []
    path = gathered(tmp_path / "model.onnx", table, *extra)
    round_weights(path, embeddings=why != "asked for")
    assert tables(path) == {"table": TensorProto.FLOAT}
    ids = np.array([[0, 9]])
    assert np.array_equal(open_session(path).run(["rows"], {"ids": ids})[0], table[ids])
