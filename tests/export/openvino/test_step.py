import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.export.onnx.weights import Quantized
from lighten.export.openvino.convert import convert
from lighten.export.openvino.settings import OpenVino
from lighten.export.openvino.step import place
from lighten.export.openvino.surgery import Surgery
from lighten.export.openvino.weights import rounded
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.onnx.test_genai import expected, off, quantized, rough

openvino = pytest.importorskip("openvino")
openvino_genai = pytest.importorskip("openvino_genai")

Tiny = Callable[..., Path]
ToOpenVino = Callable[..., Path]
IDS = np.random.default_rng(0).integers(0, 900, 40)
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("llama-tied", dtype=torch.bfloat16, num_hidden_layers=1)


@pytest.fixture(scope="module")
def traced(source: Path) -> tuple[Any, Any]:
    """A model and its graph, which tests change copies of: tracing takes longer than all the rest."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    return model, convert(model)


def logits(graph: Any) -> np.ndarray:
    """Returns the logits of a graph, or of a file, in float32."""
    request = openvino.Core().compile_model(graph, "CPU", EXACT).create_infer_request()
    count = len(IDS)
    request.infer(
        {
            "input_ids": IDS[None],
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
    )
    found: np.ndarray = request.get_tensor("logits").data[0].copy()
    return found


def placed(traced: tuple[Any, Any], checkpoint: Path | None = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a copy of the graph with codes, those of a checkpoint if there is one, and the facts."""
    (model, graph), step = traced, OpenVino(format="openvino", **settings)
    copy = graph.clone()
    kept = Quantized(Checkpoint(checkpoint)) if checkpoint else None
    return copy, place(step, Surgery(copy, model), model, kept, [])


def constants(graph: Any) -> dict[str, int]:
    """Returns the numbers of all constants with rows and columns, by their type."""
    counts: dict[str, int] = {}
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1:
            kind = node.get_element_type().get_type_name()
            counts[kind] = counts.get(kind, 0) + int(np.prod(node.shape))
    return counts


def packed(graph: Any) -> int:
    return sum(count for kind, count in constants(graph).items() if kind in ("u4", "i4", "u8", "i8"))


def greedy(path: Path, prompt: np.ndarray, count: int) -> list[int]:
    """Returns the ids that openvino-genai writes."""
    pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_PRECISION_HINT="f32")
    asked = openvino_genai.GenerationConfig()
    asked.max_new_tokens, asked.ignore_eos, asked.do_sample = count, True, False
    ids = openvino.Tensor(prompt[None].astype(np.int64))
    return list(pipeline.generate(ids, asked).tokens[0])


def test_settings() -> None:
    assert OpenVino(format="openvino").rounded and not OpenVino(format="openvino", type="fp16").rounded
    for wrong in ({"format": "onnx"}, {"format": "openvino", "type": "int5"}, {"format": "openvino", "group_size": 48}):
        with pytest.raises(ValidationError):
            OpenVino(**wrong)


def test_a_directory_for_openvino_genai(tiny: Tiny, to_openvino: ToOpenVino) -> None:
    out = to_openvino(plain := tiny("llama", num_hidden_layers=1), type="fp32")
    assert off(logits(out / "openvino_model.xml"), expected(plain)) < 1e-5
    names = {file.name for file in out.iterdir()}
    wanted = {"openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json", "tokenizer.json"}
    assert wanted | {"openvino_tokenizer.xml", "openvino_detokenizer.xml"} <= names
    graph = openvino.Core().read_model(out / "openvino_model.xml")
    assert {port.any_name for port in graph.inputs} == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    assert graph.get_rt_info(["runtime_options", "KV_CACHE_PRECISION"]).astype(str) == "f32"
    facts, warnings = (json.loads((out / f"{name}.json").read_text()) for name in ("facts", "warnings"))
    assert facts["tokenizer_strings"] == 500
    assert len(warnings) == bool(facts["tokenizer_strings_differ"])


def test_openvino_genai_writes_the_tokens_of_transformers(tiny: Tiny, to_openvino: ToOpenVino) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain := tiny("llama", num_hidden_layers=1))
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(torch.from_numpy(IDS[:9])[None], **asked)[0, 9:].tolist()
    assert greedy(to_openvino(plain, type="fp32"), IDS[:9], 12) == wanted


def test_a_checkpoint_of_codes_in_order_of_activation(source: Path, to_openvino: ToOpenVino, tmp_path: Path) -> None:
    dense = quantized(source, tmp_path / "q", order=True)
    out = to_openvino(tmp_path / "q", "gptq", embedding="float")
    assert off(logits(out / "openvino_model.xml"), expected(source, dense)) < 1e-5
    facts = json.loads((out / "facts.json").read_text())
    assert (facts["weights"], facts["weights_in_codes"]) == ("kept from gptq", sum(map(torch.numel, dense.values())))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with pytest.raises(RequestError, match="kept as they are, in 4 bits: leave out `type`"):
        to_openvino(tmp_path / "q", "gptq", type="int8")


@pytest.mark.parametrize(
    "settings", [{"bits": 8}, {"bits": 3}, {"bits": 2}, {"awq": True}, {"plain": "k_proj"}], ids=str
)
def test_weights_of_a_checkpoint_are_kept(
    source: Path, traced: tuple[Any, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    dense = quantized(source, tmp_path / "q", **settings)
    graph, _ = placed(traced, tmp_path / "q", embedding="float")
    assert off(logits(graph), expected(source, dense)) < 1e-5
    assert packed(graph) >= sum(map(torch.numel, dense.values()))


@pytest.mark.parametrize(
    ("settings", "bits", "size"),
    [({}, 4, 64), ({"zero_point": False, "group_size": 32}, 4, 32), ({"type": "int8"}, 8, None)],
    ids=str,
)
def test_rounded_weights_are_those_of_the_graph(
    source: Path, traced: tuple[Any, Any], settings: dict[str, Any], bits: int, size: int | None
) -> None:
    graph, facts = placed(traced, embedding="float", **settings)
    dense = {
        name: rounded(weight, bits, size, zero_point=settings.get("zero_point", True)).weight()
        for name, weight in traced[0].state_dict().items()
        if name.endswith("_proj.weight")
    }
    assert off(logits(graph), expected(source, dense)) < 1e-4
    assert packed(graph) >= facts["weights_in_codes"] == sum(map(torch.numel, dense.values()))
    assert facts["weights_in_floats"] == 1006 * 256


def test_embedding_and_head_have_8_bits(source: Path, traced: tuple[Any, Any]) -> None:
    graph, facts = placed(traced, ignore=("*_proj",))
    assert constants(graph)["u8"] >= facts["weights_of_embedding_in_codes"] == 1006 * 256
    assert facts["weights_in_codes"] == 0 < facts["weights_in_floats"]
    assert rough(logits(graph), expected(source)) < 0.05
    with pytest.raises(RequestError, match=r"no linear is called '\*\.7\.\*'; names are such as"):
        placed(traced, ignore=("*.7.*",))


def test_the_plugin_keeps_codes_packed_and_joins_attention_and_cache(traced: tuple[Any, Any]) -> None:
    graph, facts = placed(traced)
    compiled = openvino.Core().compile_model(graph, "CPU", EXACT).get_runtime_model()
    layers = [(node.get_rt_info()["layerType"].value, node) for node in compiled.get_ops()]
    held = [node for kind, node in layers if kind == "Const" and len(node.shape) > 1]
    wide = sum(int(np.prod(node.shape)) for node in held if node.get_output_element_type(0) == openvino.Type.f32)
    assert wide < 0.1 * (facts["weights_in_codes"] + facts["weights_of_embedding_in_codes"])
    kinds = [kind for kind, _ in layers]
    assert kinds.count("ScaledDotProductAttention") == 1 and "Softmax" not in kinds


def test_weights_of_16_bits_stay_so(source: Path, traced: tuple[Any, Any]) -> None:
    """They are multiplied in float32."""
    counts = constants(traced[1])
    assert max(counts, key=lambda kind: counts[kind]) == "bf16"
    assert off(logits(traced[1]), expected(source)) < 1e-5


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("gguf", {}, "this one is gguf: export the model that it was made from"),
        ("bitsandbytes", {}, "would be rounded twice: set type: fp32, fp16, bf16"),
        ("awq", {"ignore": ("*",)}, "leave out `ignore`"),
        ("hf", {"ignore": ("*",), "type": "fp16"}, "`ignore` is for int8 and int4"),
    ],
)
def test_refuses_other_sources(tiny: Tiny, tmp_path: Path, form: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        OpenVino(format="openvino", **settings).run(Artifact(tiny(), {"format": form}), tmp_path, Context())
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_is_one_message(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    exporter = pytest.importorskip("transformers.exporters.exporter_openvino")

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("data-dependent\nexpression")

    monkeypatch.setattr(exporter.OpenVINOExporter, "export_program", fail)
    with pytest.raises(Failure, match=r"LlamaForCausalLM cannot be made an OpenVINO graph \(ValueError: data-dep"):
        OpenVino(format="openvino").run(Artifact(tiny(), {"format": "hf"}), tmp_path, Context())
    assert list(tmp_path.iterdir()) == []
