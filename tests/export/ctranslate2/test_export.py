"""CTranslate2 computes what transformers does, from plain and from quantized checkpoints, and what it lacks is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import find_opener, open_runtime
from lighten.evaluate.runtimes.runtime import Question
from lighten.evaluate.runtimes.texts import TextRuntime, Texts
from lighten.evaluate.runtimes.torch_opener import TorchOpener
from lighten.export.ctranslate2 import converter
from lighten.export.ctranslate2.settings import CTranslate2
from lighten.model import whole
from lighten.model.checkpoint import Checkpoint
from lighten.model.ctranslate2_source import read_header
from lighten.pipeline.steps import open_step
from lighten.step import Context, silent
from lighten.store.artifact import Artifact
from tests.translators import tiny_translator

ctranslate2 = pytest.importorskip("ctranslate2")
Tiny = Callable[..., Path]
IDS = np.array([5, 9, 77, 130, 200, 201, 9, 33])


def exported(source: Path, out: Path, form: str = "hf", **settings: Any) -> Path:
    out.mkdir()
    step = CTranslate2.model_validate({"format": "ctranslate2", **settings})
    facts = step.run(Artifact(source, {"format": form}), out, Context())
    assert facts["format"] == "ctranslate2"
    return out


@pytest.fixture(scope="module")
def llama(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a model and its export in float32."""
    source = tiny("llama")
    return source, exported(source, tmp_path_factory.mktemp("ct2") / "out", quantization="float32")


@pytest.mark.parametrize("family", ["qwen2"])
def test_logits_are_those_of_transformers(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(family)
    _compare(source, exported(source, tmp_path / "out", quantization="float32"))


def test_logits_scores_and_answers_of_one_model(llama: tuple[Path, Path]) -> None:
    source, out = llama
    _compare(source, out)
    runtime, reference = open_runtime(out), open_runtime(source)
    asked = [Question([5, 9, 77], [[130], [200, 201, 9]]), Question([33], [[9, 9, 9, 9, 9], [1, 2]])]
    for mine, theirs in zip(runtime.choose_many(asked, silent), reference.choose_many(asked, silent), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert one.greedy == other.greedy

    prompt = np.stack([IDS, IDS[::-1]])
    written, expected = runtime.generate(prompt, 6), reference.generate(prompt, 6)
    assert written.ids is not None
    assert written.ids.shape == (2, 6)
    assert len(written.token_s) == 5
    if expected.ids is not None:
        np.testing.assert_array_equal(written.ids, expected.ids)

    decoding, chosen = runtime.decode(IDS.tolist(), 6), []
    logits = next(decoding)
    for _ in range(5):
        chosen.append(int(logits.argmax()))
        logits = decoding.send(chosen[-1])
    assert chosen == written.ids[0, :5].tolist()


def test_a_directory_says_what_its_model_is(llama: tuple[Path, Path]) -> None:
    source, out = llama
    opener, place = find_opener(out)
    assert opener.name == "ctranslate2"
    wanted, found = Checkpoint(source).facts, opener.facts(place)
    for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "tied", "task"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.params == wanted.params
    text = "The tower of  Pisa leans."
    assert opener.tokenizer(place).encode(text) == TorchOpener().tokenizer(source).encode(text)
    assert not list(out.glob(".building-*"))


@pytest.mark.parametrize("method", ["gptq", "awq", "w8a8"])
def test_weights_of_a_quantized_checkpoint_are_unpacked(method: str, tiny: Tiny, tmp_path: Path) -> None:
    source, quantized = tiny("llama"), tmp_path / "quantized"
    quantized.mkdir()
    settings = {"w8a8": {"method": "fp8"}, "awq": {"method": "rtn", "bits": 4, "group_size": 32, "sym": False}}
    step = open_step("quantize", settings.get(method, {"method": "rtn", "bits": 4, "group_size": 32}))
    form = step.run(Artifact(source, {"key": "x", "format": "hf"}), quantized, Context())["format"]
    out = exported(quantized, tmp_path / "out", form, quantization="float32")
    with torch.no_grad():
        expected = whole.load(quantized, torch.float32)(torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(open_runtime(out).logits(IDS), expected, atol=2e-4)
    assert not (out / "quantize_config.json").exists()


def test_int8_is_smaller_and_close(llama: tuple[Path, Path], tmp_path: Path) -> None:
    source, plain = llama
    out = exported(source, tmp_path / "out", quantization="int8")
    runtime = open_runtime(out)
    assert runtime.dtype.startswith("int8")
    assert (out / "model.bin").stat().st_size < 0.5 * (plain / "model.bin").stat().st_size
    exact = open_runtime(plain).logits(IDS)
    assert np.abs(runtime.logits(IDS) - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_codes_multiplied_as_floats_are_closer_than_those_whose_inputs_are_rounded(
    wanted: str, tiny: Tiny, tmp_path: Path
) -> None:
    source, exact = tiny("llama"), open_runtime(tiny("llama")).logits(IDS)
    rounded = exported(source, tmp_path / "rounded")
    out = exported(source, tmp_path / "out", compute_type=wanted)
    assert (out / "model.bin").read_bytes() == (rounded / "model.bin").read_bytes()
    runtime = open_runtime(out)
    known = ctranslate2.get_supported_compute_types("cpu")
    assert runtime.dtype == (wanted if wanted in known else "float32")
    ours, theirs = (float(np.square(each.logits(IDS) - exact).mean()) for each in (runtime, open_runtime(rounded)))
    assert ours < 0.7 * theirs


def test_products_in_a_type_that_does_not_exist_are_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(llama[1], tmp_path / "out")
    file = out / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "compute_type": ["int2"]}))
    with pytest.raises(RequestError, match=r"compute_type \['int2'\]: it is one of default, auto, float32"):
        open_runtime(out)


def test_products_in_the_type_of_the_weights_are_no_part_of_the_key() -> None:
    plain = CTranslate2(format="ctranslate2")
    assert "compute_type" not in plain.key_config()
    assert CTranslate2(format="ctranslate2", compute_type="float32").key_config()["compute_type"] == "float32"


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_rounding_with_feedback_is_closer_than_the_nearest_codes(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source, exact, errors = tiny(family), None, {}
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source)
        exact = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    for rounding in ("gptq", "nearest"):
        (out := tmp_path / rounding).mkdir()
        step = CTranslate2.model_validate({"format": "ctranslate2", "rounding": rounding})
        facts = step.run(Artifact(source, {"format": "hf"}), out, Context())
        assert facts["rounding"] == rounding
        errors[rounding] = float(np.square(open_runtime(out).logits(IDS) - exact).mean())
        if rounding == "gptq":
            assert facts["inputs"] == "evened and turned"
            assert facts["linears_rounded_with_feedback"] == sum(type(m) is torch.nn.Linear for m in model.modules())
        size = step.predict(Checkpoint(source).facts, 0).disk_bytes
        assert (out / "model.bin").stat().st_size == pytest.approx(size, rel=0.2)
    assert errors["gptq"] < errors["nearest"]


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """Returns a random T5 with the tokenizer of the demo translator."""
    folder = tiny_translator(tmp_path / "t5")
    told = json.loads((folder / "config.json").read_text())
    ids = {name: told[name] for name in ("pad_token_id", "eos_token_id", "vocab_size")}
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**ids, **sizes, decoder_start_token_id=ids["pad_token_id"]))
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.save_pretrained(folder)
    return folder


def test_a_translator_gives_the_answers_of_transformers(t5: Path, tmp_path: Path) -> None:
    out = exported(t5, tmp_path / "out", quantization="float32")
    mine, reference = open_runtime(out), open_runtime(t5)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    found = tokenizer(["one two three", "four"], padding=True, padding_side="right", return_tensors="np")
    texts = Texts(found["input_ids"], found["attention_mask"])
    answers = [cast(TextRuntime, each).translate(texts, 12) for each in (mine, reference)]
    assert answers[0] == answers[1]
    assert any(answers[0])
    opener, place = find_opener(out)
    assert opener.facts(place).task == "seq2seq"
    assert not opener.predicts_tokens(place)


def test_a_model_that_its_converter_does_not_take_is_said_with_the_reason(tmp_path: Path) -> None:
    source = tiny_translator(tmp_path / "source")  # its token for padding is not the last one
    with pytest.raises(Failure, match=r"does not convert this MarianMTModel .*vocabulary"):
        exported(source, tmp_path / "out")


def test_what_it_does_not_hold_is_refused_before_any_work(tiny: Tiny) -> None:
    step = CTranslate2(format="ctranslate2")
    facts = Checkpoint(tiny("llama")).facts
    unknown = type(facts)(**{**vars(facts), "architecture": "MambaForCausalLM"})
    with pytest.raises(RequestError, match=r"does not know MambaForCausalLM; it knows .*LlamaForCausalLM"):
        step.check(unknown)
    large = type(facts)(**{**vars(facts), "vocab": 1_000_000, "hidden": 8192})
    with pytest.raises(RequestError, match="more than 4 GiB in float32"):
        CTranslate2(format="ctranslate2", quantization="float32").check(large)
    with pytest.raises(RequestError, match="this one is gguf"):
        step.check_source("gguf", facts)


def test_tokens_that_spell_alike_are_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lighten.export.ctranslate2.step.read_vocabulary", lambda file: ["a", "b", "a"])
    with pytest.raises(Failure, match="two ids of the tokenizer spell 'a'"):
        exported(tiny("llama"), tmp_path / "out")


def test_the_architectures_are_those_of_the_library() -> None:
    from ctranslate2.converters import transformers as theirs

    names = {loader.architecture_name for loader in theirs._MODEL_LOADERS.values()} - {None}
    assert converter.architectures() == names


def test_a_model_of_another_maker_is_measured_without_a_manifest(llama: tuple[Path, Path], tmp_path: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    source, out = llama
    theirs = tmp_path / "theirs"
    TransformersConverter(str(source)).convert(str(theirs), quantization="float32")
    assert read_header(theirs) == read_header(out)
    with pytest.raises(Failure, match="CTranslate2 cannot load"):  # the converter alone writes null for <s> and </s>
        open_runtime(theirs)
    (theirs / "config.json").write_text((out / "config.json").read_text())
    np.testing.assert_array_equal(open_runtime(theirs).logits(IDS), open_runtime(out).logits(IDS))
    assert find_opener(theirs)[0].facts(theirs).context is None


def _compare(source: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(open_runtime(out).logits(IDS), expected, atol=2e-4)
    assert json.loads((out / "vocabulary.json").read_text())
