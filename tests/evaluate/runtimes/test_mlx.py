"""MLX directories, ours and those of mlx_lm.convert, on MLX."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.loaders.survey import survey
from lighten.evaluate.request_model import as_served
from lighten.evaluate.runtimes.choose import find_opener, open_runtime, open_tokenizer, opener
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.export.mlx.settings import Mlx
from lighten.pipeline.verbs import measure
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.evaluate.conftest import score_alone
from tests.evaluate.runtimes.test_runtimes import questions

mlx_lm: Any = pytest.importorskip("mlx_lm")
pytest.importorskip("mlx.core")

Tiny = Callable[..., Path]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlx")
    Mlx(format="mlx", dtype="float16").run(Artifact(tiny(), {"format": "hf"}), out, Context())
    return out


@pytest.fixture(scope="module")
def converted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of another maker."""
    out = tmp_path_factory.mktemp("theirs") / "model"
    mlx_lm.convert(str(plain), str(out), quantize=True, q_bits=8, dtype="float16")
    return out


@pytest.fixture
def runtime(plain: Path) -> Iterator[Runtime]:
    opened = open_runtime(plain)
    assert (opened.name, opened.dtype, opened.device) == ("mlx", "float32", "cpu")
    yield opened
    opened.close()


def test_logits_are_those_of_transformers(tiny: Tiny, runtime: Runtime) -> None:
    ids = RNG.integers(0, 900, 60)
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = runtime.logits(ids)
    assert (found.dtype, found.shape) == (np.float32, (60, runtime.vocab))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_it_serves_in_the_type_of_the_file(plain: Path, converted: Path) -> None:
    for folder, weights in ((plain, "plain weights"), (converted, "affine 8 bits in groups of 64")):
        served = as_served(folder, "cpu", trusted=False)
        assert (served.dtype, weights in served.detail) == ("float16", True)
        served.close()
    assert opener("mlx").multiplies_in("float16", "cpu") == "float16"


def test_endings_that_share_a_context_score_as_if_alone(runtime: Runtime) -> None:
    asked, seen = questions(6), []
    scores = runtime.choose_many(asked, lambda done, total, note: seen.append((done, total)))
    for question, found in zip(asked, scores, strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=1e-3)
    assert (seen[0], seen[-1]) == ((0, 6), (6, 6))


@pytest.mark.parametrize("batch", [1, 2])
def test_it_writes_what_its_logits_say(runtime: Runtime, batch: int) -> None:
    prompt = RNG.integers(0, 900, (batch, 10))
    timings = runtime.generate(prompt, 5)
    assert len(timings.token_s) == 4 and timings.ttft_s > 0 and timings.ids is not None
    for row, written in zip(prompt, timings.ids, strict=True):
        logits = runtime.logits(np.concatenate([row, written]))
        assert written.tolist() == logits[9:14].argmax(-1).tolist()
    decoding = runtime.decode(prompt[0].tolist(), 5)
    found = [int(next(decoding).argmax())]
    for _ in range(4):
        found.append(int(decoding.send(found[-1]).argmax()))
    assert found == timings.ids[0].tolist()


def test_the_end_of_a_text_can_be_taken_back(runtime: Runtime) -> None:
    assert "rewinds" in runtime.capabilities
    ids = [int(each) for each in RNG.integers(0, 900, 12)]
    expected = runtime.logits(np.array(ids)).argmax(-1).tolist()
    text = runtime.text(20)
    assert text.extend(ids[:6], 2) == expected[4:6]
    text.extend([1, 2, 3], 1)
    text.cut(6)
    assert (text.length, text.extend(ids[6:], 6)) == (6, expected[6:])


def test_a_window_takes_nothing_back_once_it_is_full(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    out.mkdir()
    Mlx(format="mlx").run(Artifact(source, {"format": "hf"}), out, Context())
    config = json.loads((out / "config.json").read_text())
    layers = ["sliding_attention", "full_attention"]
    (out / "config.json").write_text(json.dumps({**config, "layer_types": layers, "sliding_window": 8}))
    runtime = open_runtime(out)
    text = runtime.text(40)
    text.extend(list(range(1, 25)), 1)
    with pytest.raises(Failure, match="gives no tokens back once its window is full"):
        text.cut(20)
    asked = questions(3)
    for question, found in zip(asked, runtime.choose_many(asked, lambda *_: None), strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=1e-3)


def test_a_directory_of_another_maker_is_measured_on_mlx(tiny: Tiny, plain: Path, converted: Path) -> None:
    chosen, place = find_opener(converted)
    assert (chosen.name, place) == ("mlx", converted)
    assert open_tokenizer(converted).encode("a b") == open_tokenizer(tiny()).encode("a b")
    asked: Any = {"length": 64, "samples": 2}
    (row,) = measure([str(converted)], perplexity=asked)["variants"]
    assert (row["status"], row["runtime"], row["format"]) == ("ok", "mlx", "mlx"), row["error"]
    assert row["perplexity"]["value"] > 100 and 8 < row["bits_per_weight"] < 10
    ids, found = RNG.integers(0, 900, 30), []
    for folder in (plain, converted):
        runtime = open_runtime(folder)
        found.append(runtime.logits(ids))
        runtime.close()
    assert np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max()
    assert {each["loader"]: each["status"] for each in survey(converted).loads}["mlx"] == "ok"


def test_what_does_not_belong_together_is_refused(converted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(Failure, match=r"mlx_lm .* cannot load .*broken"):
        open_runtime(broken)
    (broken / "config.json").write_text(json.dumps({**config, "model_file": "model.py"}))
    (broken / "model.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(RequestError, match="names code of its own"):
        open_runtime(broken)
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "made-up"}))
    with pytest.raises(Failure, match="made-up not supported"):
        open_runtime(broken)
    (broken / "config.json").write_text(json.dumps(config))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(Failure, match="cannot load"):
        open_runtime(broken)
