import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes import llama_cpp, torch_loading
from lighten.evaluate.runtimes.batches import Layout, by_length
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.runtime import Question, Runtime, Tokenizer
from lighten.model import gguf_header
from lighten.model.packing import pack_gptq
from lighten.model.source import find
from lighten.process.isolate import run_isolated
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload, score_alone

RNG = np.random.default_rng(0)


def questions(count: int, vocab: int = 900) -> list[Question]:
    def ids(length: int) -> list[int]:
        return [int(token) for token in RNG.integers(0, vocab, length)]

    return [
        Question(ids(RNG.integers(1, 20)), [ids(RNG.integers(1, 9)) for _ in range(RNG.integers(1, 5))])
        for _ in range(count)
    ]


def test_logits_are_those_of_transformers(tiny: Tiny, runtime: Runtime) -> None:
    ids = RNG.integers(0, 900, 60)
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = runtime.logits(ids)
    assert found.dtype == np.float32
    assert found.shape == (60, runtime.vocab) == expected.shape
    tolerance = 1e-4 if runtime.name == "torch" else 2e-2  # llama.cpp keeps its cache in float16
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_endings_that_share_a_context_score_as_if_alone(runtime: Runtime) -> None:
    asked = questions(12)
    seen = []
    scores = runtime.choose_many(asked, lambda done, total, note: seen.append((done, total)))
    tolerance = 1e-3 if runtime.name == "torch" else 0.05
    for question, found in zip(asked, scores, strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=tolerance)
    assert seen[0] == (0, 12)
    assert seen[-1] == (12, 12)


def test_choose_is_a_single_question(runtime: Runtime) -> None:
    question = questions(1)[0]
    assert runtime.choose(question.context, question.endings) == runtime.choose_many([question], silent)[0]
    assert runtime.choose_many([], silent) == []


def test_greedy_is_true_for_what_the_model_would_write(runtime: Runtime) -> None:
    context = [5, 6, 7]
    first = int(runtime.logits(np.array(context))[-1].argmax())
    second = int(runtime.logits(np.array([*context, first]))[-1].argmax())
    greedy = [score.greedy for score in runtime.choose(context, [[first, second], [first, (second + 1) % 900]])]
    assert greedy == [True, False]


def test_a_question_longer_than_a_batch_is_scored(runtime: Runtime) -> None:
    long = Question([3] * 700, [[4, 5], [6]])
    found = runtime.choose_many([long, *questions(3)], silent)[0]
    alone = [score_alone(runtime, long.context, ending) for ending in long.endings]
    assert [score.logprob for score in found] == pytest.approx(alone, abs=0.1)


def test_a_runtime_does_what_it_says_it_can(runtime: Runtime) -> None:
    assert runtime.capabilities == {"logits", "scores", "decodes", "rewinds"}
    text = runtime.text(20)
    first = text.extend([5, 6, 7], 1)
    text.extend([8, 9], 1)
    text.cut(2)
    assert text.extend([7], 1) == first


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_times_every_step(runtime: Runtime, batch: int) -> None:
    timings = runtime.generate(RNG.integers(0, 900, (batch, 10)), 6)
    assert timings.ttft_s > 0
    assert len(timings.token_s) == 5
    assert all(seconds > 0 for seconds in timings.token_s)


def test_both_tokenizers_agree(tiny: Tiny, tiny_gguf: Path, runtime: Runtime) -> None:
    text = "A naïve café opens at 9:30.\n\n    x = 12345\n<|im_start|>end"
    assert runtime.encode(text) == open_tokenizer(tiny()).encode(text) == open_tokenizer(tiny_gguf).encode(text)


def test_both_tokenizers_give_the_text_back(tiny: Tiny, tiny_gguf: Path) -> None:
    text = "A naïve café opens at 9:30.\n\n    x = 12345 日本 <|im_start|>end" + "\n" * 300
    for path in (tiny(), tiny_gguf):
        tokenizer = open_tokenizer(path)
        assert tokenizer.decode(tokenizer.encode(text), special=True) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|im_start|>", "")


def test_the_default_of_a_tokenizer_decides_on_bos(tiny: Tiny, tmp_path: Path) -> None:
    assert open_tokenizer(tiny()).bos is None
    folder = shutil.copytree(tiny(), tmp_path / "with")
    (folder / "tokenizer.json").write_text(json.dumps(_with_bos(folder)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|im_start|>"}))
    opened: Tokenizer = open_tokenizer(folder)
    assert opened.bos == 1
    assert 1 not in opened.encode("some text")


def _with_bos(folder: Path) -> dict[str, object]:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    return {**json.loads((folder / "tokenizer.json").read_text()), "post_processor": template}


def test_gptq_checkpoints_score_like_their_unpacked_weights(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for model in _gptq(tiny(), tmp_path):
        out = tmp_path / f"{model.name}-measured"
        out.mkdir()
        asked = payload("perplexity", {"length": 64, "samples": 4}, model, out)
        # gptqmodel patches torch and transformers when it is imported: keep it out of this process
        found[model.name] = run_isolated("lighten.evaluate.run:measure", asked).value
    assert "gptqmodel" in found["packed"]["detail"]
    assert found["packed"]["perplexity"]["value"] == pytest.approx(found["dense"]["perplexity"]["value"], rel=1e-5)


def _gptq(source: Path, folder: Path) -> tuple[Path, Path]:
    """Returns the same rounded model twice: packed, and with plain weights."""
    packed, dense = shutil.copytree(source, folder / "packed"), shutil.copytree(source, folder / "dense")
    tensors = load_file(source / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors.pop(name)
        groups = weight.reshape(weight.shape[0], -1, 64)
        scales = (groups.abs().amax(-1) / 7).half().float()
        codes = (groups / scales[..., None]).round().clamp(-8, 7)
        plain[name] = (codes * scales[..., None]).reshape_as(weight).contiguous()
        g_idx = torch.arange(weight.shape[1], dtype=torch.int32) // 64
        whole = (codes + 8).to(torch.int32).reshape_as(weight).t().contiguous()
        zeros = torch.full(scales.t().shape, 8, dtype=torch.int32)
        linear = pack_gptq(whole, scales.t().contiguous(), zeros, g_idx, 4)
        tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in linear.items()}
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False}
    config = json.loads((packed / "config.json").read_text())
    whole_config = config | {"quantization_config": settings | {"checkpoint_format": "gptq"}}
    (packed / "config.json").write_text(json.dumps(whole_config))
    return packed, dense


def test_quality_of_gptq_weights_needs_no_gptqmodel_and_its_kernels_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, dense = _gptq(tiny(), tmp_path)
    monkeypatch.setattr(torch_loading, "find_spec", lambda module: None)
    ids = np.arange(40, 80)
    ours = open_runtime(packed)
    assert "weights unpacked by lighten, for gptqmodel" in ours.detail
    np.testing.assert_allclose(ours.logits(ids), open_runtime(dense).logits(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(RequestError, match=r"pip install 'lighten\[gptq\]'"):
        open_runtime(packed, dtype="float32")


def test_what_is_not_there_or_not_a_model_is_a_request_error(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        open_runtime(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="not a model"):
        open_runtime(tmp_path)
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(RequestError, match="neither a"):
        open_runtime(tmp_path / "notes.txt")
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny_gguf, tmp_path / name)
    with pytest.raises(RequestError, match=r"a\.gguf, b\.gguf"):
        open_runtime(tmp_path)


def test_a_directory_with_one_gguf_is_that_gguf(tmp_path: Path, tiny_gguf: Path) -> None:
    shutil.copy(tiny_gguf, tmp_path / "model.gguf")
    assert open_runtime(tmp_path).name == "llama.cpp"


@pytest.mark.parametrize("left", [0, 100, 20000])
def test_a_gguf_cut_short_is_a_failure_that_says_so(tmp_path: Path, tiny_gguf: Path, left: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_gguf.read_bytes()[: left or -1000])
    with pytest.raises(Failure, match=r"short\.gguf.*cut short") as raised:
        open_runtime(short)
    assert "no reason" not in str(raised.value)


def test_safetensors_cut_short_are_a_failure(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "short")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Failure, match=r"model\.safetensors.*cut short"):
        open_runtime(folder)


def test_pickled_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match="pickled"):
        open_runtime(folder)


def test_a_layout_places_every_ending_right_after_its_context() -> None:
    layout = Layout(Question([10, 11], [[1, 2, 3], [4], [5, 6]]))
    assert layout.ids.tolist() == [10, 11, 1, 2, 5]
    assert layout.positions.tolist() == [0, 1, 2, 3, 2]
    assert layout.segments.tolist() == [0, 0, 1, 1, 3]
    assert [pick.tolist() for pick in layout.picks] == [[0, 1, 2], [0], [0, 3]]
    assert layout.wanted.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("padded", [True, False])
def test_batches_hold_every_question_once_and_stay_within_their_room(padded: bool) -> None:
    asked = questions(50)
    batches = by_length(asked, 100, padded=padded, sequences=9)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        sizes = [asked[index].packed for index in batch]
        assert (len(sizes) * max(sizes) if padded else sum(sizes)) <= 100
        assert sum(len(asked[index].endings) for index in batch) <= 9


def test_a_directory_that_holds_one_gguf_model_is_that_model(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_text("{}")
    assert gguf_header.within(tmp_path) is None
    (tmp_path / "model-Q8_0.gguf").write_bytes(tiny_gguf.read_bytes())
    found = find(str(tmp_path))
    assert (found.form, found.path.name) == ("gguf", "model-Q8_0.gguf")
    assert found.identity == find(str(tiny_gguf)).identity
    (tmp_path / "other.gguf").write_bytes(tiny_gguf.read_bytes())
    with pytest.raises(RequestError, match=r"holds 2 \.gguf files \(model-Q8_0\.gguf, other\.gguf\): name the one"):
        find(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert gguf_header.within(tmp_path) is None


def test_llama_cpp_without_kernels_for_a_gpu_says_that_it_uses_the_processor(tiny_gguf: Path) -> None:
    if llama_cpp.load_llama().api.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp was built for a GPU")
    opened = open_runtime(tiny_gguf, device="cuda:1")
    assert opened.device == "cpu" and opened.logits(np.arange(1, 9)).shape == (8, opened.vocab)
    opened.close()


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", (-1, 0, 1)), ("cuda", (-1, 1, 0)), ("cpu", (0, 1, 0))])
def test_llama_cpp_takes_the_gpu_that_is_named(
    device: str, expected: tuple[int, ...], tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers on a GPU, whether they are split among GPUs, and the one to take if not."""
    api, asked = llama_cpp.load_llama().api, []
    plain = api.llama_model_load_from_file

    def watched(path: bytes, params: Any) -> Any:
        asked.append((params.n_gpu_layers, params.split_mode, params.main_gpu))
        return plain(path, params)

    monkeypatch.setattr(api, "llama_model_load_from_file", watched)
    llama_cpp.GgufModel(tiny_gguf, device, vocab_only=False).close()
    assert asked == [expected]
