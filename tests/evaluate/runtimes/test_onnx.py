import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.accuracy import scoring
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.perplexity import chunks
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speed import shapes
from lighten.evaluate.speed.settings import Speed
from lighten.model import onnx_source
from lighten.model.source import find
from lighten.step import silent
from tests.evaluate.conftest import score_alone
from tests.evaluate.runtimes.test_runtimes import questions

Tiny = Callable[..., Path]
ToOnnx = Callable[..., Path]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["genai", "plain"])
def folder(request: pytest.FixtureRequest, tiny: Tiny, to_onnx: ToOnnx) -> Path:
    return to_onnx(tiny(), graph=request.param, precision="fp32")


@pytest.fixture
def runtime(folder: Path) -> Iterator[Runtime]:
    opened = open_runtime(folder)
    assert (opened.name, opened.dtype, opened.device) == ("onnxruntime", "float32", "cpu")
    yield opened
    opened.close()


def test_logits_are_those_of_transformers(tiny: Tiny, runtime: Runtime) -> None:
    ids = RNG.integers(0, 900, 60)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny())(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = runtime.logits(ids)
    assert (found.dtype, found.shape) == (np.float32, (60, runtime.vocab))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert runtime.hidden() is None


def test_endings_that_share_a_context_score_as_if_alone(runtime: Runtime) -> None:
    asked = questions(8)
    seen = []
    scores = runtime.choose_many(asked, lambda done, total, note: seen.append((done, total)))
    for question, found in zip(asked, scores, strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=1e-3)
    assert (seen[0], seen[-1]) == ((0, 8), (8, 8))
    alone = [score.logprob for score in runtime.choose(asked[0].context, asked[0].endings)]
    assert alone == pytest.approx([score.logprob for score in scores[0]], abs=1e-3)


def test_onnxruntime_takes_no_tokens_back_and_says_so(runtime: Runtime) -> None:
    assert runtime.capabilities == {"logits", "scores", "decodes"}
    with pytest.raises(Failure, match="not done on onnxruntime"):
        runtime.text(20)


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_times_every_step(runtime: Runtime, batch: int) -> None:
    timings = runtime.generate(RNG.integers(0, 900, (batch, 10)), 6)
    assert len(timings.token_s) == 5
    assert timings.ttft_s > 0
    assert all(seconds > 0 for seconds in timings.token_s)


def test_generation_goes_through_an_end_of_text(tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path) -> None:
    folder = shutil.copytree(to_onnx(tiny(), graph="genai", precision="fp32"), tmp_path / "copy")
    runtime = open_runtime(folder)
    first = int(runtime.logits(np.array([5, 6, 7]))[-1].argmax())
    config = folder / "genai_config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 2', f'"eos_token_id": {first}'))
    assert f'"eos_token_id": {first}' in config.read_text()
    assert len(open_runtime(folder).generate(np.array([[5, 6, 7]]), 9).token_s) == 8


def test_the_tokenizer_is_the_models_own(tiny: Tiny, folder: Path, runtime: Runtime) -> None:
    text = "Hello  there, 123 <|im_end|> naïve 日本語"
    ids = open_tokenizer(tiny()).encode(text)
    assert open_tokenizer(folder).encode(text) == runtime.encode(text) == ids


def test_all_measurements(tiny: Tiny, folder: Path, runtime: Runtime) -> None:
    settings = Perplexity(length=64, samples=2)
    tokenizer = open_tokenizer(tiny())
    found = chunks.measure(runtime, tokenizer, settings, silent).result.contents()
    wanted = chunks.measure(open_runtime(tiny()), tokenizer, settings, silent).result.contents()
    assert found["perplexity"]["value"] == pytest.approx(wanted["perplexity"]["value"], rel=1e-5)
    assert found["tokenizer_match"]
    scored = scoring.measure(runtime, tokenizer, Accuracy(limit=4), silent).result.contents()["accuracy"]
    assert scored["n"] == 4
    timed = shapes.measure(runtime, Speed(prompt=8, generate=4, repeats=2), silent).speed[0]
    assert timed.decode_tok_s and timed.decode_tok_s > 0
    assert timed.dtype == "float32"


def test_precision_is_read_from_the_graph(tiny: Tiny, to_onnx: ToOnnx) -> None:
    int4 = to_onnx(tiny("llama-tied"))
    graph = onnx_source.read_graph(int4 / "model.onnx")
    assert (graph.precision, graph.vocab) == ("int4", 1006)
    found = find(str(int4))
    assert (found.form, found.facts.params) == ("onnx", find(str(tiny("llama-tied"))).facts.params)
    (config := int4 / "config.json").rename(hidden := int4 / "hidden.json")
    try:
        facts = onnx_source.facts(int4)
        assert (facts.layers, facts.hidden, facts.vocab) == (2, 256, 1006)
        assert facts.params == pytest.approx(found.facts.params, rel=0.01)
    finally:
        hidden.rename(config)


def test_a_directory_without_its_data_file(tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path) -> None:
    folder = shutil.copytree(to_onnx(tiny(), graph="genai", precision="fp32"), tmp_path / "copy")
    data = folder / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(
        Failure, match=r"model.onnx.data has [\d,]+ bytes of the [\d,]+ that model.onnx needs: cut short"
    ):
        open_runtime(folder)
    data.unlink()
    with pytest.raises(Failure, match=r"keeps its weights in model\.onnx\.data, which is missing: copy it"):
        open_runtime(folder)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])
    with pytest.raises(Failure, match="cut short or damaged"):
        open_runtime(folder)


def test_what_is_no_causal_model_is_refused(tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", *ends)), tmp_path / "model.onnx")
    with pytest.raises(RequestError, match="takes x and gives y: not a causal language model"):
        open_runtime(tmp_path)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        RequestError, match=rf"the package {module}, which is not installed: pip install 'lighten\[onnx\]'"
    ):
        open_runtime(folder)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_what_a_session_uses_counts_and_not_what_is_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA provider that is there and does not start; the GPU that is asked for is the one that was named."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime can use a GPU here")
    assert open_runtime(folder, device="cuda:1").device == "cpu"
    asked: list[list[object]] = []
    plain = onnxruntime.InferenceSession

    def watched(graph: object, options: object, providers: list[object]) -> object:
        asked.append(providers)
        return plain(graph, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    opened = open_runtime(folder, device="cuda:1")
    opened.logits(np.arange(1, 9))
    assert asked == [[("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]]
    assert opened.device == "cpu" and "did not start" in opened.detail
