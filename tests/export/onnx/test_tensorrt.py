import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from lighten.errors import Failure
from lighten.export.onnx.tensorrt import OPSETS, TABLE, TAKES, facts, lacking
from lighten.report.facts import pairs

Tiny = Callable[..., Path]
ToOnnx = Callable[..., Path]
GENAI = {
    "com.microsoft::GroupQueryAttention",
    "com.microsoft::SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization",
}
TYPES = {"a": TensorProto.FLOAT, "b": TensorProto.FLOAT, "c": TensorProto.BOOL, "i": TensorProto.INT32}


def model(*nodes: onnx.NodeProto, functions: Any = (), opset: int = 20, types: Any = TYPES) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, kind, [2]) for name, kind in types.items()]
    made = helper.make_graph(list(nodes), "g", inputs, [])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    return helper.make_model(made, opset_imports=imports, functions=list(functions))


def saved(path: Path, *nodes: onnx.NodeProto) -> Path:
    path.write_bytes(model(*nodes).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({"graph": "plain"}, set()),
        ({"graph": "plain", "precision": "fp16"}, set()),
        ({"graph": "plain", "precision": "int8"}, {"DynamicQuantizeLinear", "MatMulInteger", "Gather of INT8"}),
        ({"graph": "genai", "precision": "fp32"}, GENAI),
        (
            {"graph": "genai"},
            GENAI | {"com.microsoft::MatMulNBits", "com.microsoft::GatherBlockQuantized", "Reshape of UINT8"},
        ),
    ],
)
def test_exports_say_what_tensorrt_lacks(
    tiny: Tiny, to_onnx: ToOnnx, settings: dict[str, Any], lacks: set[str]
) -> None:
    out = to_onnx(tiny("llama"), **settings)
    told = json.loads((out / "facts.json").read_text())["tensorrt"]
    assert told == facts([out / "model.onnx"])
    assert {each.partition(" ×")[0] for each in told["lacks"]} == lacks
    assert (told["supported"], told["checked_with"]) == (not lacks, TABLE)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    for name in lacks - {"Gather of INT8"}:
        operator = name.removesuffix(" of UINT8").rpartition("::")[2]
        count = sum(node.op_type == operator for node in graph.node)
        assert f"{name} ×{count}" in told["lacks"]


def test_the_table_names_operators_and_types_of_onnx() -> None:
    known = {each.name for each in onnx.defs.get_all_schemas() if each.domain == ""}
    older = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of ONNX's first experiments
    assert set(TAKES) - known == older
    assert set().union(*TAKES.values()) <= set(TensorProto.DataType.keys())
    assert (OPSETS[0], OPSETS[-1]) == (9, 24)


def test_an_operator_that_nobody_knows() -> None:
    nodes = (helper.make_node("Warp", ["a"], ["x"]), helper.make_node("Relu", ["x"], ["y"]))
    assert lacking(model(*nodes)) == {"Warp": 1}
    assert lacking(model(helper.make_node("Relu", ["a"], ["x"], domain="my"))) == {"my::Relu": 1}
    assert lacking(model(helper.make_node("Relu", ["a"], ["x"], domain="ai.onnx"))) == {}


def test_types_that_are_not_taken() -> None:
    types = {**TYPES, "d": TensorProto.DOUBLE, "u": TensorProto.UINT8, "n": 99}
    nodes = [helper.make_node("MatMul", [name, "b"], [f"x{name}"]) for name in types]
    nodes += [helper.make_node("MatMul", [f"x{name}", "b"], [f"y{name}"]) for name in types]  # types that nobody told
    found = lacking(model(*nodes, types=types))
    assert found == {"MatMul of BOOL": 1, "MatMul of INT32": 1, "MatMul of UINT8": 1, "MatMul of type 99": 1}


def test_inner_graphs_are_looked_into() -> None:
    step = helper.make_graph(
        [helper.make_node("Det", ["a"], ["s"]), helper.make_node("Sigmoid", ["i"], ["t"])],  # `i` is the outer one
        "step",
        [],
        [],
    )
    loop = helper.make_node("Loop", ["", "c"], ["l"], body=step)
    then = helper.make_graph([loop], "then", [], [])
    other = helper.make_graph([helper.make_node("Unique", ["a"], ["o"])], "other", [], [])
    found = lacking(model(helper.make_node("If", ["c"], ["x"], then_branch=then, else_branch=other)))
    assert found == {"Det": 1, "Sigmoid of INT32": 1, "Unique": 1}


def test_functions_of_the_model_are_its_own_operators() -> None:
    imports = [helper.make_opsetid("", 20)]
    body = [helper.make_node("Relu", ["p"], ["q"]), helper.make_node("Unique", ["q"], ["r"])]
    function = helper.make_function("my", "Once", ["p"], ["r"], body, imports)
    calls = [helper.make_node(name, ["a"], [name], domain="my") for name in ("Once", "Twice")]
    assert lacking(model(*calls, functions=[function])) == {"Unique": 1, "my::Twice": 1}


@pytest.mark.parametrize(("opset", "lacks"), [(8, {"opset 8": 1}), (9, {}), (24, {}), (25, {"opset 25": 1})])
def test_versions_of_the_operators(opset: int, lacks: dict[str, int]) -> None:
    assert lacking(model(helper.make_node("Relu", ["a"], ["x"]), opset=opset)) == lacks


def test_two_graphs_are_one_answer(tmp_path: Path) -> None:
    one = saved(tmp_path / "encoder_model.onnx", helper.make_node("Unique", ["a"], ["x"]))
    two = saved(
        tmp_path / "decoder_model.onnx",
        helper.make_node("Det", ["a"], ["x"]),
        *(helper.make_node("Unique", ["a"], [name]) for name in "yz"),
    )
    told = facts([one, two])
    assert told == {"supported": False, "lacks": ["Unique ×3", "Det ×1"], "checked_with": TABLE}
    said = "does not take Unique ×3, Det ×1, by the operator table of TensorRT 10.15; not measured here"
    assert pairs({"tensorrt": told}) == [("TensorRT", said)]
    fine = facts([saved(tmp_path / "fine.onnx", helper.make_node("Relu", ["a"], ["x"]))])
    said = "knows all operators, by the operator table of TensorRT 10.15; not measured here"
    assert pairs({"tensorrt": fine}) == [("TensorRT", said)]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 40])
def test_a_damaged_graph(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = saved(tmp_path / "model.onnx", *(helper.make_node("Relu", ["a"], [f"x{i}"]) for i in range(9)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Failure, match=r"model\.onnx .*cut short or damaged; export or fetch it again") as caught:
        facts([path])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("value", [None, True, "yes", ["a"], {"supported": "no"}, {"supported": True, "lacks": 1}])
def test_the_report_takes_other_facts_of_that_name(value: Any) -> None:
    ((label, said),) = pairs({"tensorrt": value})
    assert (label, isinstance(said, str)) == ("TensorRT", True)
