"""A model in a real llama-server beside the same one in llama.cpp itself."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lighten.errors import Failure
from lighten.evaluate.accuracy.harness.generation import write
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer, words_of
from lighten.evaluate.runtimes.endpoint.runtime import EndpointRuntime, shared
from lighten.evaluate.runtimes.wanted import Sampling, Wanted
from lighten.step import silent
from tests.evaluate.runtimes.endpoint.measured import SMALL, SPEED, ran


def test_perplexity_through_a_server_is_that_of_llama_cpp(llama: str, tiny_gguf: Path, tmp_path: Path) -> None:
    ours = ran("perplexity", SMALL, llama, tmp_path / "server")
    theirs = ran("perplexity", SMALL, tiny_gguf, tmp_path / "direct")
    assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity"]["value"], rel=1e-4)
    assert ours["perplexity"]["tokens"] == theirs["perplexity"]["tokens"]
    assert ours["perplexity"]["protocol"]["ids_sha256"] == theirs["perplexity"]["protocol"]["ids_sha256"]
    assert ours["perplexity"]["bits_per_byte"] == pytest.approx(theirs["perplexity"]["bits_per_byte"], rel=1e-4)
    assert (ours["runtime"], ours["device"], ours["dtype"]) == ("endpoint", "server", "all F32")
    assert "one forced token after the other" in ours["detail"] and ours["tokenizer_match"]


def test_accuracy_through_a_server_is_that_of_llama_cpp(llama: str, tiny_gguf: Path, tmp_path: Path) -> None:
    ran("accuracy", {"limit": 3}, llama, tmp_path / "server")
    ran("accuracy", {"limit": 3}, tiny_gguf, tmp_path / "direct")
    ours, theirs = (load_file(tmp_path / name / "values.safetensors") for name in ("server", "direct"))
    assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=1e-3, nan_ok=True)
    assert (ours["choice"] == theirs["choice"]).all() and (ours["choice_norm"] == theirs["choice_norm"]).all()


def test_a_server_writes_what_llama_cpp_writes(llama: str, tiny_gguf: Path) -> None:
    server, own = open_runtime(f"{llama}#tokenizer={tiny_gguf}"), open_runtime(tiny_gguf)
    tokenizer = open_tokenizer(tiny_gguf)
    asked = [Wanted(tokenizer.encode(text), 6 + n) for n, text in enumerate(("The dog went", "One two", "A"))]
    seen: list[tuple[int, int]] = []
    found = write(server, tokenizer, (), asked, lambda done, total, note: seen.append((done, total)))
    expected = write(own, tokenizer, (), asked, silent)
    assert (found, seen) == (expected, [(n, 3) for n in range(4)])
    letter = expected[0][3]
    until = [Wanted(asked[0].prompt, 6, ("never here", letter))]
    assert write(server, tokenizer, (), until, silent) == [expected[0][: expected[0].index(letter)]]
    warm = [Wanted(each.prompt, 6, sampling=Sampling(0.8, 10, 0.9)) for each in asked]
    assert len(write(server, tokenizer, (), warm, silent)) == 3
    assert words_of(f"{llama}#tokenizer={tiny_gguf}").render.keys() == {"default"}
    server.close()


def test_parts_of_characters_have_log_probabilities_too(llama: str, tiny_gguf: Path) -> None:
    tokenizer, direct, served = open_tokenizer(tiny_gguf), open_runtime(tiny_gguf), open_runtime(llama)
    parts = [each for each in range(direct.vocab) if "\ufffd" in tokenizer.decode([each])]
    endings = [parts[at : at + 6] for at in range(0, len(parts), 6)] + [[2, 40]]  # and one through the end of text
    assert len(parts) > 128
    greedy = [int(direct.logits(np.array([40, 41, 42]))[-1].argmax())]
    ours, theirs = (each.choose([40, 41, 42], [*endings, greedy]) for each in (served, direct))
    assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], rel=1e-3)
    assert [each.greedy for each in ours] == [each.greedy for each in theirs] and ours[-1].greedy
    direct.close()


def test_speed_and_load_through_a_server(llama: str, tmp_path: Path) -> None:
    speed = ran("speed", {**SPEED, "batch": [1, 2]}, llama, tmp_path / "speed")
    for each in speed["speed"]:
        assert each["prefill_tok_s"] > 0 and each["decode_tok_s"] > 0 and each["ttft_ms"]["p50"] > 0
    assert "peak_rss_bytes" not in speed["memory"] and "joules_per_token" not in speed["energy"]
    asked = {"rate": 50, "concurrency": [1, 3], "requests": 4, "prompt": 20, "generate": 6}
    load = ran("load", asked, llama, tmp_path / "load")
    assert [(each["rate"], each["concurrency"]) for each in load["load"]] == [(50, None), (None, 1), (None, 3)]
    for each in load["load"]:
        assert (each["completed"], each["errors"]) == (4, {}) and each["ttft_ms"]["p50"] > 0
        assert each["server"].startswith("llama.cpp at 127.0.0.1:") and each["throughput_tok_s"] > 0


def test_a_prompt_is_never_one_that_the_server_has_read(llama: str) -> None:
    opened = open_runtime(llama)
    assert isinstance(opened, EndpointRuntime)
    writer, prompts = opened._abilities.writer, []
    assert writer
    write = writer.write
    writer.write = lambda prompt, *more: (prompts.append(prompt), write(prompt, *more))[1]  # type: ignore[method-assign]
    prompt = np.arange(24).reshape(2, 12)
    for _ in range(3):
        found = opened.generate(prompt, 3)
        assert len(found.token_s) == 2 and found.ttft_s > 0
    assert len({each[0] for each in prompts}) == 6 and {len(each) for each in prompts} == {12}
    assert (prompt == np.arange(24).reshape(2, 12)).all()


def test_tokens_of_one_piece_share_its_time() -> None:
    assert shared([1.0, 2.0, 4.0]) == pytest.approx([1, 2, 4])
    assert shared([1.0, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0]) == pytest.approx([1, 1, 2, 2.5, 3, 3.5, 4])
    with pytest.raises(Failure, match="all 2 tokens in one piece"):
        shared([1.0, 1.0])
