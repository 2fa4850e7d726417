"""Real profiles of models that are built to have one bottleneck each."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lighten.evaluate.profiling import SUMMARY, TRACE, profile
from lighten.evaluate.profiling.torch import kind_of
from lighten.step import silent
from tests.evaluate.conftest import Tiny

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "vocab_size": 200,
}


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Path]:
    def make(**sizes: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "model"
        LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes})).save_pretrained(folder)
        return folder

    return make


def found(model: Path, out: Path, prompt: int = 32, steps: int = 6) -> dict[str, dict[str, Any]]:
    out.mkdir()
    value = profile(
        {
            "model": str(model),
            "out": str(out),
            "device": "cpu",
            "prompt": prompt,
            "steps": steps,
            "trust_remote_code": False,
        },
        silent,
    )
    assert json.loads((out / SUMMARY).read_text()) == value
    trace = json.loads(gzip.decompress((out / TRACE).read_bytes()))
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    assert sum(event.get("ph") == "X" for event in events) > 20
    phases = {phase["name"]: phase for phase in value["phases"]}
    for phase in phases.values():
        assert sum(phase["shares"].values()) == pytest.approx(1, abs=0.05)
    return phases


def test_wide_matrices_are_bound_by_reading_weights(built: Callable[..., Path], tmp_path: Path) -> None:
    model = built(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2)
    phases = found(model, tmp_path / "out")
    assert phases["decode"]["verdict"] == "weights"
    assert phases["prefill"]["verdict"] == "products"


def test_a_tiny_deep_model_is_bound_by_overhead(built: Callable[..., Path], tmp_path: Path) -> None:
    assert found(built(num_hidden_layers=12), tmp_path / "out")["decode"]["verdict"] == "overhead"


def test_a_large_vocabulary_is_bound_by_the_head(built: Callable[..., Path], tmp_path: Path) -> None:
    model = built(hidden_size=512, vocab_size=120_000, num_hidden_layers=1)
    assert found(model, tmp_path / "out")["decode"]["verdict"] == "head"


def test_a_long_prompt_is_bound_by_attention(built: Callable[..., Path], tmp_path: Path) -> None:
    phases = found(built(num_hidden_layers=1), tmp_path / "out", prompt=4096, steps=2)
    assert phases["prefill"]["verdict"] == "attention"


def test_a_long_cache_is_bound_by_attending_to_it_and_copying_it(built: Callable[..., Path], tmp_path: Path) -> None:
    model = built(num_attention_heads=16, num_key_value_heads=16, head_dim=256, num_hidden_layers=1)
    phases = found(model, tmp_path / "out", prompt=4096, steps=4)
    shares = phases["decode"]["shares"]
    # transformers puts its cache together anew at every step: which of the two takes longer is the machine's
    assert shares["copies"] > 0.02
    assert shares["copies"] + shares["attention"] > 0.5
    assert phases["decode"]["verdict"] in ("copies", "attention")


def test_packed_weights_are_bound_by_unpacking_them(built: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    from lighten.pipeline.steps import open_step
    from lighten.step import Context
    from lighten.store.artifact import Artifact

    model = built(hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=16)
    out = tmp_path / "packed"
    out.mkdir()
    step = open_step("quantize", {"method": "rtn", "bits": 8, "group_size": 128})
    step.run(Artifact(model, {"format": "hf"}), out, Context())
    phases = found(out, tmp_path / "out", prompt=8)  # GPTQModel has no kernel for 8 bits on a CPU: it unpacks
    assert phases["decode"]["verdict"] == "dequantization"


@pytest.mark.parametrize(
    ("name", "labels", "kind"),
    [
        ("aten::mm", [], "products"),
        ("aten::mm", ["head", "decode"], "head"),
        ("aten::_weight_int4pack_mm_for_cpu", ["quantized", "decode"], "products"),
        ("bitsandbytes::gemv_4bit", ["quantized"], "products"),
        ("bitsandbytes::dequantize_4bit", [], "dequantization"),
        ("aten::bitwise_and", ["quantized"], "dequantization"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], "attention"),
        ("aten::bmm", [], "attention"),
        ("aten::copy_", [], "copies"),
        ("aten::cumsum", [], "other"),
    ],
)
def test_what_an_operator_is_for(name: str, labels: list[str], kind: str) -> None:
    assert kind_of(name, labels) == kind


def test_llama_cpp_is_watched_node_by_node(tiny_gguf: Path, tmp_path: Path) -> None:
    phases = found(tiny_gguf, tmp_path / "out")
    names = {each["name"] for each in phases["decode"]["operators"]}
    assert {"MUL_MAT", "RMS_NORM"} <= names
    heads = [each for each in phases["decode"]["operators"] if each["kind"] == "head" and each["name"] == "MUL_MAT"]
    assert heads[0]["calls"] == 6
    prefill = [each for each in phases["prefill"]["operators"] if each["kind"] == "head" and each["name"] == "MUL_MAT"]
    assert prefill[0]["calls"] == 1


def test_onnxruntime_profiles_itself(tiny: Tiny, to_onnx: Callable[..., Path], tmp_path: Path) -> None:
    phases = found(to_onnx(tiny(), precision="fp32"), tmp_path / "out")
    calls = {each["kind"]: each["calls"] for each in phases["decode"]["operators"]}
    assert calls["attention"] == 2 * 6 and "products" in calls
    assert {file.name for file in (tmp_path / "out").iterdir()} == {SUMMARY, TRACE}
