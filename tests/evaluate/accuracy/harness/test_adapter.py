"""The adapter beside lm-eval's own model for transformers, and beside plain forward passes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lighten.errors import Failure
from lighten.evaluate.accuracy.harness.generation import write
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.wanted import Sampling, Wanted
from lighten.step import silent
from tests.evaluate.conftest import Tiny

pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM

from lighten.evaluate.accuracy.harness.adapter import RuntimeLM

PAIRS = [
    ("The dog went to the", " park and slept"),
    ("The dog went to the", " market"),
    ("The dog went to the ", "sea"),
    ("A cat sat on", " the mat."),
    ("", "Nothing came before this"),
    ("One two three", " four"),
    ("The dog went to the", " x"),
]
TOLERANCE = {"torch": 1e-4, "llama.cpp": 0.15, "onnxruntime": 1e-3}


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def peer(folder: Path) -> Any:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)


@pytest.fixture(params=["torch", "llama.cpp", "onnxruntime"])
def adapted(request: pytest.FixtureRequest, tiny: Tiny, tiny_gguf: Path) -> Iterator[RuntimeLM]:
    if request.param == "onnxruntime":
        to_onnx: Callable[..., Path] = request.getfixturevalue("to_onnx")
        path = to_onnx(tiny(), precision="fp32")
    else:
        path = tiny() if request.param == "torch" else tiny_gguf
    runtime = open_runtime(path)
    assert runtime.name == request.param
    yield RuntimeLM(runtime, open_tokenizer(tiny()), silent)
    runtime.close()


def test_loglikelihoods_are_those_of_lm_eval(tiny: Tiny, adapted: RuntimeLM) -> None:
    requests = [asked(*pair) for pair in PAIRS]
    found, expected = adapted.loglikelihood(requests, True), peer(tiny()).loglikelihood(requests, True)
    assert [each[0] for each in found] == pytest.approx(
        [each[0] for each in expected], abs=TOLERANCE[adapted.runtime.name]
    )
    assert [each[1] for each in found] == [each[1] for each in expected]
    assert adapted.truncated == 0


def test_a_context_is_computed_once_for_all_its_endings(tiny: Tiny) -> None:
    runtime = open_runtime(tiny())
    seen: list[int] = []
    computed = runtime.choose_many
    runtime.choose_many = lambda questions, report: seen.append(len(questions)) or computed(questions, report)  # type: ignore
    RuntimeLM(runtime, open_tokenizer(tiny()), silent).loglikelihood([asked(*pair) for pair in PAIRS], True)
    assert seen == [4]


def test_greedy_endings_are_recognized(tiny: Tiny, adapted: RuntimeLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    ids = tokenizer("The dog").input_ids
    with torch.no_grad():
        best = int(AutoModelForCausalLM.from_pretrained(tiny())(torch.tensor([ids])).logits[0, -1].argmax())
    assert adapted._loglikelihood_tokens([(None, ids, [best]), (None, ids, [best ^ 1])])[0][1] is True
    assert adapted._loglikelihood_tokens([(None, ids, [best ^ 1])])[0][1] is False


def test_rolling_loglikelihoods_are_those_of_lm_eval(tiny: Tiny, adapted: RuntimeLM) -> None:
    other = peer(tiny())
    other._max_length = adapted.max_length = 16
    requests = [asked("One short text."), asked("A longer text, " * 20)]
    expected = other.loglikelihood_rolling(requests, True)
    assert adapted.loglikelihood_rolling(requests, True) == pytest.approx(expected, rel=1e-3)


def test_text_is_that_of_lm_eval(tiny: Tiny, adapted: RuntimeLM) -> None:
    other = peer(tiny())
    free = other.generate_until([asked("The dog went", {"until": [], "max_gen_toks": 12})], True)[0]
    assert len(free) > 4
    settings = [{"until": [], "max_gen_toks": 12}, {"until": [free[3]], "max_gen_toks": 12}, {"max_gen_toks": 3}]
    requests = [asked(text, each) for text in ("The dog went", "One two") for each in settings]
    expected = other.generate_until(requests, True)
    assert adapted.generate_until(requests, True) == expected
    assert expected[1] == free[: free.index(free[3])]


@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_those_of_lm_eval(tiny: Tiny, tiny_bos: Path, bos: bool) -> None:
    folder = tiny_bos if bos else tiny()
    other, adapted = peer(folder), RuntimeLM(open_runtime(folder), open_tokenizer(folder), silent)
    assert (adapted.prefix_token_id, adapted.eot_token_id) == (other.prefix_token_id, other.eot_token_id)
    assert adapted.max_length == other.max_length == 512
    for text in ("The dog", " two words", other.tokenizer.decode([other.prefix_token_id]) + "after it"):
        assert adapted.tok_encode(text) == other.tok_encode(text)
        assert adapted.tok_encode(text, add_special_tokens=False) == other.tok_encode(text, add_special_tokens=False)


def test_a_context_that_is_too_long_is_cut_from_the_left_and_counted(tiny: Tiny, adapted: RuntimeLM) -> None:
    other = peer(tiny())
    other._max_length = adapted.max_length = 20
    requests = [asked("word " * 40 + "end", " of it all"), asked("short", " one")]
    expected = other.loglikelihood(requests, True)
    found = adapted.loglikelihood(requests, True)
    assert [each[0] for each in found] == pytest.approx(
        [each[0] for each in expected], abs=TOLERANCE[adapted.runtime.name]
    )
    assert adapted.truncated == 1
    written = [asked("word " * 40 + "end", {"until": [], "max_gen_toks": 5})]
    assert adapted.generate_until(written, True) == other.generate_until(written, True)
    assert adapted.truncated == 2


def test_what_cannot_be_cut_is_refused(tiny: Tiny) -> None:
    adapted = RuntimeLM(open_runtime(tiny()), open_tokenizer(tiny()), silent)
    adapted.max_length = 8
    with pytest.raises(Failure, match=r"a text of \d+ tokens, and the model takes 8: that cannot be cut"):
        adapted.loglikelihood([asked("a", " word" * 30)], True)
    with pytest.raises(Failure, match="write 8 tokens, and it takes 8 in all"):
        adapted.generate_until([asked("a", {"max_gen_toks": 8})], True)


def test_decoding_gives_the_logits_of_one_pass(adapted: RuntimeLM) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    decoding = adapted.runtime.decode(ids[:3], 4)
    rows = [next(decoding).copy(), *(decoding.send(token).copy() for token in ids[3:])]
    expected = adapted.runtime.logits(np.array(ids))[2:]
    assert np.abs(np.stack(rows) - expected).max() < 1e-2 * np.abs(expected).max()
    with pytest.raises(StopIteration):
        decoding.send(1)


def test_sampling_keeps_to_its_shares() -> None:
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert Sampling().choose(logits, rng) == 0
    drawn = np.bincount([Sampling(1.0).choose(logits, rng) for _ in range(4000)], minlength=4) / 4000
    assert drawn == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert {Sampling(1.0, top_k=2).choose(logits, rng) for _ in range(200)} == {0, 1}
    assert {Sampling(1.0, top_p=0.79).choose(logits, rng) for _ in range(200)} == {0, 1}
    warm = np.bincount([Sampling(0.5).choose(logits, rng) for _ in range(4000)], minlength=4) / 4000
    sharp = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    assert warm == pytest.approx(sharp / sharp.sum(), abs=0.03)


def test_writing_ends_with_the_text(tiny: Tiny) -> None:
    runtime, tokenizer = open_runtime(tiny()), open_tokenizer(tiny())
    asked = [Wanted([5, 6], 8)]
    decoding = runtime.decode([5, 6], 8)
    tokens = [int(next(decoding).argmax())]
    while len(tokens) < 8:
        tokens.append(int(decoding.send(tokens[-1]).argmax()))
    assert write(runtime, tokenizer, (), asked, silent) == [tokenizer.decode(tokens)]
    until = tokenizer.decode(tokens[: tokens.index(tokens[2])])
    assert write(runtime, tokenizer, {tokens[2]}, asked, silent) == [until]


def test_what_is_drawn_depends_on_neither_order_nor_batch(
    tiny: Tiny, adapted: RuntimeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = Sampling(1.5, top_k=50)
    asked = [Wanted([5 + n, 6, *range(7, 7 + 3 * n)], 4 + n, sampling=warm) for n in range(5)]
    asked.append(asked[2])
    seen: list[tuple[int, int]] = []
    drawn = write(adapted.runtime, adapted.text, (), asked, lambda done, total, note: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(7)]
    assert drawn[5] != drawn[2]  # the same request again is drawn anew
    monkeypatch.setattr(type(adapted.runtime), "decode_many", Defaults.decode_many)
    assert write(adapted.runtime, adapted.text, (), asked, silent) == drawn
    assert write(adapted.runtime, adapted.text, (), asked[:3], silent) == drawn[:3]


def test_written_texts_stand_in_the_order_of_their_requests(tiny: Tiny, adapted: RuntimeLM) -> None:
    requests = [asked("word " * n + "The dog", {"until": [], "max_gen_toks": 2 + n % 4}) for n in (1, 7, 3, 0, 9)]
    assert adapted.generate_until(requests, True) == peer(tiny()).generate_until(requests, True)
