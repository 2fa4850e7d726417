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
from lighten.evaluate.loaders.survey import survey
from lighten.evaluate.perplexity import chunks
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes.choose import find_opener, open_runtime, open_tokenizer, served_in
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speed import shapes
from lighten.evaluate.speed.settings import Speed
from lighten.step import silent
from tests.evaluate.conftest import score_alone
from tests.evaluate.runtimes.test_runtimes import questions

openvino = pytest.importorskip("openvino")
pytest.importorskip("openvino_genai")

Tiny = Callable[..., Path]
ToOpenVino = Callable[..., Path]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(source: Path, to_openvino: ToOpenVino) -> Path:
    return to_openvino(source, type="fp32")


@pytest.fixture
def runtime(folder: Path) -> Iterator[Runtime]:
    opened = open_runtime(folder)
    assert (opened.name, opened.dtype, opened.device) == ("openvino", "float32", "cpu")
    yield opened
    opened.close()


def test_logits_are_those_of_transformers(source: Path, runtime: Runtime) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    for length in (60, 7):  # the second text begins anew
        ids = RNG.integers(0, 900, length)
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        found = runtime.logits(ids)
        assert (found.dtype, found.shape) == (np.float32, (length, runtime.vocab))
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert runtime.detail.endswith("computes in f32, keeps keys and values in f32")


def test_endings_that_share_a_context_score_as_if_alone(runtime: Runtime) -> None:
    asked = questions(8)
    seen: list[tuple[int, int]] = []
    scores = runtime.choose_many(asked, lambda done, total, note: seen.append((done, total)))
    for question, found in zip(asked, scores, strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=1e-3)
    assert (seen[0], seen[-1]) == ((0, 8), (8, 8))


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_writes_the_likeliest_tokens_and_times_them(source: Path, folder: Path, batch: int) -> None:
    prompt = RNG.integers(0, 900, (batch, 10))
    runtime = open_runtime(folder, dtype=served_in(folder, "cpu"))
    timings = runtime.generate(prompt, 6)
    assert len(timings.token_s) == 5 and timings.ttft_s > 0 and min(timings.token_s) > 0
    model = AutoModelForCausalLM.from_pretrained(source)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert timings.ids is not None
    assert timings.ids[:, 0].tolist() == model.generate(torch.from_numpy(prompt), **asked)[:, 10].tolist()
    runtime.close()


def test_it_decodes_token_after_token(runtime: Runtime) -> None:
    ids = RNG.integers(0, 900, 5).tolist()
    decoding = runtime.decode(ids, 4)
    logits = next(decoding)
    for _ in range(3):
        assert np.abs(logits - open_runtime_logits(runtime, ids)).max() < 1e-3
        ids.append(int(logits.argmax()))
        decoding = runtime.decode(ids, 4)
        logits = next(decoding)


def open_runtime_logits(runtime: Runtime, ids: list[int]) -> np.ndarray:
    return runtime.logits(np.array(ids))[-1].copy()


def test_the_tokenizer_is_that_of_the_graph_and_the_models_own(source: Path, folder: Path, runtime: Runtime) -> None:
    text = "Hello  there, 123 <|im_end|> and a naïve end"
    assert open_tokenizer(folder).encode(text) == open_tokenizer(source).encode(text) == runtime.encode(text)


def test_all_measurements(source: Path, folder: Path, runtime: Runtime) -> None:
    settings = Perplexity(length=64, samples=2)
    tokenizer = open_tokenizer(source)
    found = chunks.measure(runtime, tokenizer, settings, silent).result.contents()
    wanted = chunks.measure(open_runtime(source), tokenizer, settings, silent).result.contents()
    assert found["perplexity"]["value"] == pytest.approx(wanted["perplexity"]["value"], rel=1e-5)
    assert found["tokenizer_match"]
    scored = scoring.measure(runtime, tokenizer, Accuracy(limit=4), silent).result.contents()["accuracy"]
    assert scored["n"] == 4
    timed = shapes.measure(runtime, Speed(prompt=8, generate=4, repeats=2), silent).speed[0]
    assert timed.decode_tok_s and timed.decode_tok_s > 0


def test_it_is_a_loader(folder: Path) -> None:
    found = {load["loader"]: (load["status"], load["error"]) for load in survey(folder).loads}
    assert found["openvino"] == ("ok", None)
    assert {status for status, _ in found.values()} == {"ok", "other"}


def test_what_it_serves(folder: Path, tmp_path: Path) -> None:
    for target in (folder, folder / "openvino_model.xml"):
        assert find_opener(target)[0].name == "openvino"
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").touch()
    assert find_opener(copy)[0].name == "torch"


def test_files_that_are_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Failure, match=r"openvino_model\.xml cannot be read .*: cut short or damaged"):
        open_runtime(copy)
    weights.unlink()
    with pytest.raises(Failure, match=r"has its weights in openvino_model\.bin, which is missing"):
        open_runtime(copy)


def test_graphs_of_others(folder: Path, tmp_path: Path) -> None:
    """One that has no manifest and no config runs if its cache is inside."""
    import openvino.opset13 as ops

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        shutil.copy(folder / name, bare)
    ids = RNG.integers(0, 900, 9)
    assert np.array_equal(open_runtime(bare).logits(ids), open_runtime(folder).logits(ids))
    value = ops.parameter([-1, 4], np.float32, name="x")
    value.output(0).set_names({"x"})
    made = ops.relu(value)
    made.output(0).set_names({"y"})
    openvino.save_model(openvino.Model([made], [value]), tmp_path / "openvino_model.xml")
    (tmp_path / "openvino_model.bin").touch()
    with pytest.raises(RequestError, match="takes x and gives y: not a causal language model"):
        open_runtime(tmp_path)


def test_a_graph_with_its_cache_outside_is_refused(tmp_path: Path) -> None:
    import openvino.opset13 as ops

    inputs = []
    for name, kind in (("input_ids", np.int64), ("attention_mask", np.int64), ("past_key_values.0.key", np.float32)):
        each = ops.parameter([-1, -1], kind, name=name)
        each.output(0).set_names({name})
        inputs.append(each)
    logits = ops.convert(ops.add(inputs[0], inputs[1]), "f32")
    logits.output(0).set_names({"logits"})
    openvino.save_model(openvino.Model([logits], inputs), tmp_path / "openvino_model.xml")
    (tmp_path / "openvino_model.bin").touch()
    with pytest.raises(RequestError, match=r"also takes past_key_values.0.key: convert it again with its cache inside"):
        open_runtime(tmp_path)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RequestError, match=r"needs the package openvino, .* pip install 'lighten\[openvino\]'"):
        open_runtime(folder)
