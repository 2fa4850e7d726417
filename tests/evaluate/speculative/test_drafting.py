"""A draft changes how quickly a text is written, and nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.errors import Failure
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speculative import drafting
from lighten.evaluate.speculative.drafting import plain, speculate
from lighten.evaluate.speculative.settings import Speculative
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload

PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 900, 12)]


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> Runtime:
    return open_runtime(tiny())


@pytest.fixture(scope="module")
def gguf(tiny_gguf: Path) -> Runtime:
    return open_runtime(tiny_gguf)


@pytest.fixture(scope="module")
def stranger(tiny: Tiny) -> Runtime:
    """A model with the same tokenizer and other weights, whose proposals are hardly ever right."""
    return open_runtime(tiny("llama-bias"))


def greedy(runtime: Runtime, steps: int) -> list[int]:
    """Without a cache."""
    ids = list(PROMPT)
    for _ in range(steps):
        ids.append(int(runtime.logits(np.array(ids))[-1].argmax()))
    return ids[len(PROMPT) :]


def test_plain_decoding_is_greedy(target: Runtime, gguf: Runtime) -> None:
    for runtime in (target, gguf):
        assert plain(runtime, PROMPT, 12).ids == greedy(runtime, 12)


def test_a_text_can_be_taken_back(target: Runtime, gguf: Runtime) -> None:
    for runtime in (target, gguf):
        text = runtime.text(30)
        straight = text.extend([*PROMPT, 5, 6], 3)
        assert text.length == 14
        text.cut(10)
        assert text.length == 10
        assert text.extend([7, 8], 2) != straight[1:]
        text.cut(10)
        assert text.extend([*PROMPT[10:], 5, 6], 3) == straight


@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.parametrize("draft", ["target", "gguf", "stranger"])
def test_what_is_written_is_what_the_target_writes_alone(
    request: pytest.FixtureRequest, target: Runtime, draft: str, tokens: int
) -> None:
    """In float32, whatever the draft proposes."""
    other = open_runtime(target._tokenizer_path) if draft == "target" else request.getfixturevalue(draft)  # type: ignore[attr-defined]
    for steps in (2, 3, 20):
        found = speculate(target, other, PROMPT, steps, tokens)
        assert found.ids == plain(target, PROMPT, steps).ids and len(found.ids) == steps
        assert 0 <= found.accepted <= found.proposed
        if draft == "target":
            assert found.accepted == found.proposed
            rounds = -(-(steps - 1) // (tokens + 1))  # each writes what was proposed and one token more
            assert found.proposed == steps - 1 - rounds
        elif draft == "stranger":
            assert found.accepted <= found.proposed / 2


def test_a_gguf_can_be_the_target(target: Runtime, gguf: Runtime) -> None:
    found = speculate(gguf, target, PROMPT, 20, 4)
    assert found.ids == plain(gguf, PROMPT, 20).ids and found.accepted > 0


def test_a_measurement(tiny: Tiny, tiny_gguf: Path, tmp_path: Path) -> None:
    config = {"draft": "q", "tokens": 3, "prompt": 20, "generate": 12, "samples": 3, "dtype": "float32"}
    found = measure(payload("speculative", config, tiny(), tmp_path, draft=tiny_gguf), silent)
    told = found["speculative"]
    assert told["identical"] and told["parted"] == [] and found["warnings"] == []
    assert told["acceptance"] > 0.9 and told["texts"] == 3 and told["dtype"] == "float32"
    assert told["speedup"] == pytest.approx(told["decode_tok_s"] / told["plain_tok_s"])


def test_texts_that_part_are_told_with_the_gap(target: Runtime, gguf: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = drafting.speculate

    def strays(*asked: object) -> drafting.Written:
        found = honest(*asked)  # type: ignore[arg-type]
        return drafting.Written([*found.ids[:-1], found.ids[-1] + 1], found.seconds, found.proposed, found.accepted)

    monkeypatch.setattr(drafting, "speculate", strays)
    settings = Speculative(draft="q", prompt=20, generate=9, samples=2)
    found = drafting.measure(target, gguf, settings, silent).contents()
    assert not found["speculative"]["identical"]
    assert [each["position"] for each in found["speculative"]["parted"]] == [8, 8]
    assert all(each["gap"] > 0 for each in found["speculative"]["parted"])
    assert "2 of 2 texts are not what the target writes alone, the first from token 9 on" in found["warnings"][0]


def test_a_draft_that_reads_otherwise_is_refused(tiny: Tiny, target: Runtime) -> None:
    other = open_runtime(tiny("llama", "spm"))
    with pytest.raises(Failure, match="take one with the same tokenizer"):
        drafting.measure(target, other, Speculative(draft="q", prompt=20, generate=9), silent)


def test_a_padded_draft_of_the_same_tokenizer_is_taken(tiny: Tiny, target: Runtime, tmp_path: Path) -> None:
    """Its head also finds rows likely that are no tokens: nothing else is written for that."""
    folder = Path(shutil.copytree(tiny(), tmp_path / "padded"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 400, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[rows:] = 1.2 * model.lm_head.weight[:400]
    model.save_pretrained(folder)
    draft = open_runtime(folder)
    found = drafting.measure(
        target, draft, Speculative(draft="q", prompt=20, generate=12, samples=2), silent
    ).contents()
    assert found["speculative"]["identical"]
    back = drafting.measure(draft, target, Speculative(draft="q", prompt=20, generate=12, samples=2), silent).contents()
    assert back["speculative"]["identical"]


def test_a_draft_of_another_vocabulary_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"different vocabularies .*the first that differs is id 3"):
        measure(payload("speculative", {"draft": "q"}, tiny(), tmp_path, draft=tiny("llama", "spm")), silent)
