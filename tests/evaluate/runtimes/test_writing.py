"""Several texts that are written at the same time are those that are written one after the other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lighten.evaluate.runtimes import llama_cpp, torch_writing
from lighten.evaluate.runtimes.batches import longest_first, to_write
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime
from lighten.evaluate.runtimes.runtime import Floats, Runtime
from lighten.evaluate.runtimes.torch import TorchRuntime
from tests.evaluate.conftest import Tiny

RNG = np.random.default_rng(3)
PROMPTS = [[int(token) for token in RNG.integers(0, 900, length)] for length in (3, 17, 9, 30, 1, 9, 12)]
MOST = [9, 4, 12, 7, 0, 1, 12]
END = 5
"""Text that ends after two tokens of its own accord."""


@pytest.fixture(params=["torch", "llama.cpp"])
def exact(request: pytest.FixtureRequest, tiny: Tiny, tiny_gguf: Path) -> Iterator[Runtime]:
    """A runtime that computes in float32, its cache too."""
    if request.param == "torch":
        opened: Runtime = open_runtime(tiny())
    else:
        opened = LlamaCppRuntime(tiny_gguf, "cpu", float32_cache=True)
    yield opened
    opened.close()


def greedy(write: Callable[..., None], prompts: list[list[int]], most: list[int]) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]

    def choose(number: int, logits: Floats) -> int | None:
        written[number].append(int(logits.argmax()))
        return None if number == END % len(prompts) and len(written[number]) == 2 else written[number][-1]

    write(prompts, most, choose)
    return written


def one_by_one(runtime: Runtime) -> Callable[..., None]:
    return lambda *asked: Defaults.decode_many(runtime, *asked)  # type: ignore[arg-type]


def test_texts_of_a_batch_are_those_of_one_at_a_time(exact: Runtime) -> None:
    expected = greedy(one_by_one(exact), PROMPTS, MOST)
    assert [len(each) for each in expected] == [9, 4, 12, 7, 0, 1, 12]
    assert greedy(exact.decode_many, PROMPTS, MOST) == expected


def test_a_text_that_ends_leaves_the_others_alone(exact: Runtime) -> None:
    most = [2, 3, 12, 2, 9, 9, 2]
    expected = greedy(one_by_one(exact), PROMPTS, most)
    assert len(expected[END]) == 2
    assert greedy(exact.decode_many, PROMPTS, most) == expected


def test_batches_are_bounded_by_the_room_for_their_cache(exact: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "SEQUENCES", 2)
    monkeypatch.setitem(torch_writing.PROMPT_TOKENS, "cpu", 30)
    assert greedy(exact.decode_many, PROMPTS, MOST) == greedy(one_by_one(exact), PROMPTS, MOST)
    monkeypatch.setattr(llama_cpp, "CACHE_BYTES", 1)
    assert greedy(exact.decode_many, PROMPTS, MOST) == greedy(one_by_one(exact), PROMPTS, MOST)
    exact.decode_many([], [], lambda number, logits: None)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "llama-bias"])
def test_families_write_together(tiny: Tiny, family: str) -> None:
    sizes = {"sliding_window": 8} if family == "mistral" else {}
    runtime = open_runtime(tiny(family, **sizes))
    assert isinstance(runtime, TorchRuntime) and runtime._pads()
    assert greedy(runtime.decode_many, PROMPTS, MOST) == greedy(one_by_one(runtime), PROMPTS, MOST)


def test_a_model_that_does_not_bear_padding_writes_one_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(tiny(), "cpu", None)
    computed, batches = runtime.model.forward, []

    def without_mask(*args: Any, attention_mask: Any = None, **given: Any) -> Any:
        batches.append(len(given["input_ids"]))
        return computed(*args, **given)

    monkeypatch.setattr(runtime.model, "forward", without_mask)
    assert not runtime._pads()
    batches.clear()
    assert greedy(runtime.decode_many, PROMPTS, MOST) == greedy(one_by_one(runtime), PROMPTS, MOST)
    assert set(batches) == {1}


def test_batches_have_the_longest_first_and_fit() -> None:
    assert longest_first(PROMPTS, MOST) == [3, 1, 6, 2, 5, 0]
    batches = to_write(PROMPTS, MOST, together=40, room=lambda length: 100 // length)
    assert [number for batch in batches for number in batch] == longest_first(PROMPTS, MOST)
    for batch in batches:
        width = max(len(PROMPTS[number]) for number in batch)
        assert len(batch) == 1 or len(batch) * width <= 40
        assert len(batch) <= max(1, 100 // (width + max(MOST[number] for number in batch)))
    assert len(batches) < 6
