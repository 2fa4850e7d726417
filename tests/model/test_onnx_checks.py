import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import Failure, LightenError, RequestError
from lighten.evaluate.loaders import survey as loaders
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.model.onnx_checks import check_genai
from lighten.model.onnx_source import genai, read_graph
from lighten.model.source import find

onnx = pytest.importorskip("onnx")
Tiny = Callable[..., Path]


def graph(folder: Path, op: str = "MatMul", domain: str = "", inner: bool = False, **external: str) -> Path:
    """Writes a product with a constant whose weights lie outside, in the graph or in a node of an inner graph."""
    from onnx import TensorProto, helper

    weight = onnx.TensorProto(name="w", dims=[4, 4], data_type=TensorProto.FLOAT, data_location=1)
    for key, value in external.items():
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    constants, nodes = [weight], [helper.make_node(op, ["x", "w"], ["y"], domain=domain)]
    if inner:
        body = helper.make_graph([helper.make_node("Constant", [], ["w"], value=weight), *nodes], "then", [], [y])
        constants = [helper.make_tensor("c", TensorProto.BOOL, [], [True])]
        nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    made = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants))
    (folder / "w.data").write_bytes(bytes(64))
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("external", "told"),
    [
        ({"location": "../w.data"}, "names the file '../w.data'"),
        ({"location": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "140000000"}, "names the file"),
        ({}, "names the file"),
        ({"location": "link.data"}, "leads out of the directory"),
        ({"location": "none.data"}, r"none\.data, which is missing"),
        ({"location": "w.data", "offset": "64"}, "64 bytes of the 128 that"),
        ({"location": "w.data", "length": "65"}, "64 bytes of the 65 that"),
        ({"location": "w.data", "offset": "-4"}, "'-4', no number"),
        ({"location": "w.data", "offset": "9" * 300}, "no number"),
    ],
)
def test_weights_lie_beside_the_graph(tmp_path: Path, inner: bool, external: dict[str, str], told: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(bytes(64))
    (folder / "link.data").symlink_to("../w.data")
    with pytest.raises(LightenError, match=told):
        read_graph(graph(folder, inner=inner, **external))
    assert read_graph(graph(folder, inner=inner, location="w.data")).outputs == ["y"]


@pytest.mark.parametrize(("op", "domain"), [("MatMul", "evil"), ("EPContext", "com.microsoft")])
def test_operators_of_other_libraries_are_refused(tmp_path: Path, op: str, domain: str) -> None:
    for inner in (False, True):
        with pytest.raises(RequestError, match=f"needs the operator {op}"):
            read_graph(graph(tmp_path, op, domain, inner, location="w.data"))


def builders() -> dict[str, Any]:
    """Returns settings as the official builder writes them for a GPU, with all that it may add."""
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [{"cuda": {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1"}}],
            "ep.cuda.fpa_intb_gemm": "1",
        },
        "filename": "model.onnx",
        "head_size": 64,
        "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
        "outputs": {"logits": "logits"},
        "sliding_window": {"window_size": 128, "slide_inputs": False, "layers": [0, 2]},
    }
    model = {"decoder": decoder, "type": "llama", "eos_token_id": [1, 2], "vocab_size": 1000}
    return {"model": model, "search": {"do_sample": False, "top_p": 1.0, "max_length": 100}}


def changed(where: str, value: Any) -> dict[str, Any]:
    made = builders()
    *path, last = where.split("/")
    there: Any = made
    for key in path:
        there = there.setdefault(key, {})
    there[last] = value
    return made


def test_what_the_builder_writes_is_taken(tmp_path: Path) -> None:
    check_genai(builders(), tmp_path / "genai_config.json")
    for plain in ([], [{"cpu": {}}], [{"dml": {}}], [{"webgpu": {"enableGraphCapture": "1"}}]):
        check_genai(changed("model/decoder/session_options/provider_options", plain), tmp_path / "genai_config.json")


OPTIONS = "model/decoder/session_options"
HOSTILE = [
    (f"{OPTIONS}/custom_ops_library", "evil.so"),
    ("model/custom_ops_library", "evil.so"),
    ("model/encoder/session_options/custom_ops_library", "evil.so"),
    (f"{OPTIONS}/enable_profiling", "/root/trace"),
    (f"{OPTIONS}/session.model_external_initializers_file_folder_path", "/"),
    (f"{OPTIONS}/provider_options", [{"cuda": {"x": "evil.so"}}]),
    (f"{OPTIONS}/provider_options", [{"qnn": {}}]),
    (f"{OPTIONS}/provider_options", [{"QNN": {"backend_path": "evil.so"}}]),
    (f"{OPTIONS}/provider_options", ["evil"]),
    ("model/decoder/filename", "../other/model.onnx"),
    ("model/decoder/pipeline", [{"embed": {"filename": "/tmp/x.onnx"}}]),
    ("model/decoder/inputs/past_key_names", "past.%s%n.key"),
    ("model/decoder/inputs/past_key_names", "%d%d"),
    ("model/vision/config_filename", "x.json"),
    ("model/type", "../x"),
    ("engine/library", "evil.so"),
]


@pytest.mark.parametrize(("where", "value"), HOSTILE)
def test_what_could_load_code_is_refused_by_name(tmp_path: Path, where: str, value: Any) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(changed(where, value)))
    with pytest.raises(RequestError, match=r"genai_config\.json"):
        genai(tmp_path)


def test_deep_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text('{"a":' * 300 + "1" + "}" * 300)
    with pytest.raises(RequestError, match="nested too deep"):
        genai(tmp_path)


def test_no_reader_of_a_directory_loads_its_library(tiny: Tiny, to_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(to_onnx(tiny(), graph="genai", precision="fp32"), tmp_path / "model"))
    file = folder / "genai_config.json"
    settings = json.loads(file.read_text())
    settings["model"]["decoder"]["session_options"]["custom_ops_library"] = "evil.so"
    file.write_text(json.dumps(settings))
    (folder / "evil.so").write_bytes(b"\x7fELF")
    told = "model.decoder.session_options.custom_ops_library"
    with pytest.raises(RequestError, match=told):
        open_runtime(folder)
    loads = {load["loader"]: load for load in loaders.survey(folder).loads}
    assert told in loads["onnxruntime-genai"]["error"] and told in loads["onnxruntime"]["error"]
    (folder / "config.json").unlink()
    with pytest.raises(RequestError, match=told):
        find(str(folder))


def test_a_graph_as_large_as_no_graph_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(1 << 35)
    with pytest.raises(Failure, match="less than 2 GB"):
        read_graph(tmp_path / "model.onnx")
