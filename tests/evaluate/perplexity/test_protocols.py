"""Each protocol against a direct loop over a model of transformers', in float64."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lighten.data.text import load_documents, load_text
from lighten.errors import RequestError
from lighten.evaluate.perplexity import protocols
from lighten.evaluate.perplexity.change import by_chunk
from lighten.evaluate.perplexity.change import change as change_of_perplexity
from lighten.evaluate.perplexity.settings import CLOSE, CLUSTERED, Perplexity
from lighten.evaluate.run import measure
from lighten.evaluate.settings import Evaluate
from lighten.facts import ModelFacts
from lighten.pipeline.checks import check_measurable
from lighten.pipeline.recipe import parse_settings
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload

FACTS = ModelFacts("LlamaForCausalLM", 2, 8, 8, 2, 2, 4, 100, False, context=1024)


class NoBos:
    bos = None


def run(out: Path, model: Path, tokenizer: Path, **config: Any) -> dict[str, Any]:
    out.mkdir()
    return measure(payload("perplexity", config, model, out, tokenizer), silent)["perplexity"]


@torch.no_grad()
def nll(model: Any, ids: list[int], first: int) -> list[float]:
    """Negative log-likelihood of the tokens from `first` on, each given those before it."""
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-float(logprobs[place - 1, ids[place]]) for place in range(first, len(ids))]


def opened(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), AutoTokenizer.from_pretrained(folder)


def test_chunks_do_not_overlap_and_the_rest_is_dropped() -> None:
    assert protocols.cut(list(range(11)), 4, None, None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert protocols.cut(list(range(11)), 4, 1, None).tolist() == [[0, 1, 2, 3]]
    assert protocols.cut(list(range(7)), 4, None, 99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5]]
    with pytest.raises(RequestError, match="3 tokens, fewer than one chunk of 4"):
        protocols.cut([1, 2, 3], 4, None, None)


@pytest.mark.parametrize("bos", [False, True])
def test_gptq_scores_all_but_the_first_of_chunks_without_bos(
    tiny: Tiny, tiny_bos: Path, tmp_path: Path, bos: bool
) -> None:
    folder = tiny_bos if bos else tiny()
    model, tokenizer = opened(folder)
    ids = tokenizer(load_text("builtin", "perplexity"), add_special_tokens=False).input_ids
    losses = [loss for n in range(3) for loss in nll(model, ids[n * 48 : (n + 1) * 48], 1)]
    found = run(tmp_path / "a", folder, folder, protocol="gptq", length=48, samples=3)
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["tokens"] == len(losses) == 3 * 47
    assert (found["protocol"]["name"], found["protocol"]["bos"]) == ("gptq", False)


@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_scores_the_second_half_after_a_bos(tiny: Tiny, tiny_bos: Path, tmp_path: Path, bos: bool) -> None:
    folder = tiny_bos if bos else tiny()
    model, tokenizer = opened(folder)
    assert load_text("builtin", "perplexity").endswith("\n")
    ids = tokenizer(load_text("builtin", "perplexity")[:-1], add_special_tokens=False).input_ids
    first = [tokenizer.bos_token_id] if bos else []
    ids = first + ids
    losses: list[float] = []
    for number in range(3):
        chunk = ids[number * 50 : (number + 1) * 50]
        losses += nll(model, first + chunk[len(first) :], 26)
    found = run(tmp_path / "a", folder, folder, protocol="llama.cpp", length=50, samples=3)
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["tokens"] == len(losses) == 3 * 24
    assert found["protocol"]["bos"] is bos


def test_a_gguf_file_gives_what_its_source_gives(tiny: Tiny, tiny_gguf: Path, tmp_path: Path) -> None:
    for number, (name, length) in enumerate({"gptq": 64, "llama.cpp": 64, "lm-eval": None}.items()):
        config = {"protocol": name, "length": length, "samples": 3}
        source = run(tmp_path / f"{number}", tiny(), tiny(), **config)
        made = run(tmp_path / f"{number}-gguf", tiny_gguf, tiny(), **config)
        assert made["value"] == pytest.approx(source["value"], rel=2e-3)
        assert made["protocol"]["ids_sha256"] == source["protocol"]["ids_sha256"]


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": each}) for each in documents))
    return path


@pytest.mark.parametrize("bos", [False, True])
def test_lm_eval_predicts_every_token_of_every_document(tiny: Tiny, tiny_bos: Path, tmp_path: Path, bos: bool) -> None:
    folder = tiny_bos if bos else tiny()
    model, tokenizer = opened(folder)
    documents = [text[:size] for text, size in zip(load_documents("builtin", "perplexity"), (300, 40), strict=False)]
    file = write(tmp_path / "two.jsonl", documents)
    total, count = 0.0, 0
    for text in documents:
        ids = tokenizer(text).input_ids
        assert (ids[0] == tokenizer.bos_token_id) is bos
        # with BOS where the tokenizer puts one, as lm-eval has it
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        count += len(ids)
        for start in range(0, len(ids), 32):
            seen = [prefix, *ids][max(start - 32 + len(ids[start : start + 32]), 0) : start + 32 + 1]
            total += sum(nll(model, seen, len(seen) - len(ids[start : start + 32])))
    found = run(tmp_path / "a", folder, folder, protocol="lm-eval", length=32, data=str(file))
    words = sum(len(text.split()) for text in documents)
    assert found["value"] == found["levels"]["word"] == pytest.approx(math.exp(total / words), rel=1e-5)
    assert found["levels"]["token"] == pytest.approx(math.exp(total / count), rel=1e-5)
    letters = sum(len(text.encode()) for text in documents)
    assert found["levels"]["byte"] == pytest.approx(math.exp(total / letters), rel=1e-5)
    assert found["levels"]["bits_per_byte"] == pytest.approx(total / letters / math.log(2), rel=1e-5)
    assert found["tokens"] == count
    assert found["protocol"]["unit"] == "word"


def test_the_change_by_word_is_that_of_the_sums(tiny: Tiny, tmp_path: Path) -> None:
    config = {"protocol": "lm-eval", "samples": 5, "length": 64}
    base = run(tmp_path / "a", tiny(), tiny(), **config)
    other = run(tmp_path / "b", tiny("llama-bias"), tiny(), **config)
    change = change_of_perplexity(tmp_path / "b", tmp_path / "a")
    assert change["relative"] == pytest.approx(other["value"] / base["value"] - 1)
    assert change["absolute"] == pytest.approx(other["value"] - base["value"])
    assert change["ci95"][0] < change["relative"] < change["ci95"][1]
    same = change_of_perplexity(tmp_path / "a", tmp_path / "a")
    assert (same["relative"], same["ci95"]) == (0, [0, 0])


def test_perplexities_of_two_protocols_are_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    # without BOS both cut the text into the same chunks, so that only the name tells them apart
    run(tmp_path / "a", tiny(), tiny(), protocol="lighten", length=64, samples=2)
    run(tmp_path / "b", tiny(), tiny(), protocol="gptq", length=64, samples=2)
    with pytest.raises(RequestError, match=r"protocol gptq .* by lighten: .* cannot be compared"):
        change_of_perplexity(tmp_path / "b", tmp_path / "a")


def test_chunks_longer_than_the_context_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"gptq takes chunks of 2048 tokens, but .* 512 positions: set `length`"):
        run(tmp_path / "a", tiny(), tiny(), protocol="gptq")
    asked = Evaluate.model_validate({"perplexity": [{}, {"protocol": "gptq"}]})
    with pytest.raises(RequestError, match="chunks of 2048 tokens, but mine takes 1024 positions"):
        check_measurable(FACTS, asked, "mine")
    check_measurable(FACTS, Evaluate.model_validate({"perplexity": {"protocol": "gptq", "length": 1024}}), "mine")


def test_a_protocol_has_its_own_length() -> None:
    lengths = {name: Perplexity.model_validate({"protocol": name}).length for name in protocols.METHODS}
    assert lengths == {"lighten": 512, "gptq": 2048, "llama.cpp": 512, "lm-eval": None}
    assert Perplexity.model_validate({"protocol": "gptq", "length": 64}).length == 64


@pytest.mark.parametrize(("within", "chunks"), [(0.0125, 10), (0.005, 61), (0.5, 8)])
def test_within_is_a_number_of_chunks_known_before_and_spread_over_the_text(within: float, chunks: int) -> None:
    ids, whole = list(range(512 * 41 + 7)), np.arange(512 * 41).reshape(41, 512)
    found = protocols.chunked(ids, Perplexity(within=within), NoBos())  # type: ignore[arg-type]
    asked = min(chunks, 41)
    assert Perplexity(within=within).most == chunks and (len(found.ids), found.of) == (asked, 41)
    assert np.array_equal(found.ids, whole[np.arange(asked) * 41 // asked])
    first = protocols.chunked(ids, Perplexity(samples=10), NoBos())  # type: ignore[arg-type]
    assert np.array_equal(first.ids, whole[:10])


def test_within_holds_for_a_variant_as_near_as_it_plans_for() -> None:
    """Simulated: logits with noise, 0.05 nats from their source; intervals of the change are about as wide as asked."""
    random = np.random.default_rng(0)
    asked = Perplexity(within=0.03, length=129)
    logits = random.normal(0, 2, (asked.most, 128, 200))
    noisy = logits + random.normal(0, np.sqrt(2 * CLOSE), logits.shape)
    logprobs, changed = (each - np.logaddexp.reduce(each, -1, keepdims=True) for each in (logits, noisy))
    divergence = (np.exp(logprobs) * (logprobs - changed)).sum(-1).mean()
    drawn = np.argmax(logprobs + random.gumbel(size=logprobs.shape), -1)[..., None]  # a text that the source wrote
    nll, base = (-np.take_along_axis(each, drawn, -1)[..., 0] for each in (changed, logprobs))
    low, high = by_chunk(nll, base)["ci95"]
    assert divergence == pytest.approx(CLOSE, rel=0.15)
    assert (high - low) / 2 == pytest.approx(0.03 / math.sqrt(CLUSTERED), rel=0.35)


@pytest.mark.parametrize("more", [{"samples": 3}, {"protocol": "lm-eval"}])
def test_within_takes_the_place_of_a_number(more: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="within decides how many chunks"):
        parse_settings(Evaluate, {"perplexity": {"within": 0.01, **more}}, "recipe")


def test_the_results_say_how_much_within_took(tiny: Tiny, tmp_path: Path) -> None:
    found = run(tmp_path / "a", tiny(), tiny(), length=64, within=0.5)
    assert (found["protocol"]["chunks"], found["tokens"]) == (8, 8 * 63)
    assert found["protocol"]["within"] == 0.5 and found["protocol"]["chunks_of_text"] > 100


def test_what_was_measured_before_there_were_protocols_is_found_again() -> None:
    assert Perplexity().key_config() == {"data": "builtin", "length": 512, "samples": None}
    assert Perplexity(protocol="gptq").key_config()["protocol"] == "gptq"


def test_a_protocol_that_is_asked_for_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="the protocol gptq is asked for twice"):
        parse_settings(Evaluate, {"perplexity": [{"protocol": "gptq"}, {"protocol": "gptq", "length": 64}]}, "recipe")
