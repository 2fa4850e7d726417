"""Models of many families as graphs: those that the builder of onnxruntime-genai knows, and those that torch traces."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.export.onnx import builder
from lighten.export.onnx.plain import write
from lighten.export.onnx.settings import Onnx
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families import models
from tests.families.models import make

ToOnnx = Callable[..., Path]
IDS = np.random.default_rng(0).integers(5, 900, 24)
GENAI = ("gemma2", "gemma3_text", "gpt_oss", "lfm2", "lfm2_moe", "mistral", "phi3")
"""Windows of 8 tokens, norms of queries, sinks and experts, convolutions with a state, fused linears."""


@torch.no_grad()
def expected(path: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", GENAI)
def test_a_genai_graph_is_the_model(family: str, to_onnx: ToOnnx, tmp_path: Path) -> None:
    """All at once, then token by token with what the graph keeps, and by onnxruntime-genai itself."""
    source = make(family, tmp_path)
    out = to_onnx(source, precision="fp32")
    wanted = expected(source)
    runtime = open_runtime(out)
    assert off(runtime.logits(IDS), wanted) < 1e-5
    steps = runtime.decode(IDS[:4].tolist(), len(IDS))
    found = [next(steps), *(steps.send(int(each)) for each in IDS[4:])]
    assert off(np.stack(found), wanted[3:]) < 1e-5
    assert len(runtime.generate(IDS[None], 3).token_s) == 2
    runtime.close()


@pytest.mark.parametrize(("family", "name"), [("phi", "layer_norm_eps"), ("nemotron", "norm_eps")])
def test_norms_add_what_the_config_says(
    family: str, name: str, to_onnx: ToOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder reads it by one name, that of RMS norms, and takes 1e-6 where that is missing."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "num_hidden_layers": 1, name: 0.1}
    monkeypatch.setitem(models.OWN, family, sizes)
    source = make(family, tmp_path)
    assert off(open_runtime(to_onnx(source, precision="fp32")).logits(IDS), expected(source)) < 1e-5


def test_a_family_that_the_builder_gets_wrong_has_a_plain_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.OWN, "olmo", {"num_hidden_layers": 1})
    (source := tmp_path / "model").mkdir()
    (out := tmp_path / "out").mkdir()
    make("olmo", source)
    context = Context()
    facts = Onnx(format="onnx").run(Artifact(source, {"format": "hf"}), out, context)
    assert (facts["graph"], facts["precision"]) == ("plain", "fp32")
    assert any("a plain graph, because" in each and "subtract the mean" in each for each in context.warnings)
    assert off(open_runtime(out).logits(IDS), expected(source)) < 1e-5
    with pytest.raises(RequestError, match=r"its graph would be another model: OLMo's norms .*Use graph: plain"):
        Onnx(format="onnx", graph="genai").check(Checkpoint(source).facts)


@pytest.mark.parametrize(("width", "dtype"), [(96, torch.float32), (64, torch.bfloat16)])
def test_gemmas_numbers_have_all_their_digits(
    width: int, dtype: torch.dtype, to_onnx: ToOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder rounds the embedding's factor to two digits, and adds 1 to the norms' weights in their own type."""
    monkeypatch.setitem(models.OWN, "gemma3_text", {"num_hidden_layers": 1, "hidden_size": width})
    source = make("gemma3_text", tmp_path, dtype)
    runtime = open_runtime(to_onnx(source, precision="fp32"))
    assert off(runtime.logits(IDS), expected(source)) < 1e-5
    runtime.close()


def test_what_the_builder_knows_is_read_from_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(onnxruntime_genai.__file__).parent / "models/builder.py").read_text()
    assert builder.architectures() == set(re.findall(r'architectures\[0\] == "(\w+)"', text))
    assert builder.knows("Lfm2MoeForCausalLM") and not builder.knows("OPTForCausalLM")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    builder.architectures.cache_clear()
    yield
    builder.architectures.cache_clear()


def test_without_the_builder_nothing_is_refused_in_its_name(without: None) -> None:
    assert builder.architectures() == frozenset() and builder.knows("OPTForCausalLM")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "mamba2",
            "cannot trace Mamba2ForCausalLM as a plain .*: write it as GGUF, or serve it with transformers",
        ),
        ("lfm2", "its cache has LinearAttentionLayer, and a graph takes keys and values.*: graph: genai may hold it"),
    ],
)
def test_a_plain_graph_has_keys_and_values_only(family: str, message: str, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    (source := tmp_path / "model").mkdir()
    make(family, source)
    with pytest.raises(Failure, match=message):
        write(source, out, Checkpoint(source).facts, "fp32", Context())
    assert list(out.iterdir()) == []


def test_a_family_that_only_torch_knows_is_a_plain_graph(
    to_onnx: ToOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with experts, which are chosen for each token."""
    monkeypatch.setitem(models.OWN, "qwen3_moe", {"num_hidden_layers": 1})
    source = make("qwen3_moe", tmp_path)
    assert Onnx(format="onnx").resolved_graph(Checkpoint(source).facts) == "plain"
    runtime = open_runtime(to_onnx(source))
    assert off(runtime.logits(IDS), expected(source)) < 1e-5
    runtime.close()
