import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from lighten.data.choices import Choice, load_choices
from lighten.errors import Failure
from lighten.evaluate.accuracy import scoring
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload, score_alone


class Letters:
    """A tokenizer of single letters, in which "." and a space after it are one token."""

    bos: int | None = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text.replace(". ", "\0")]


def test_context_and_ending_are_parted_where_the_context_ends() -> None:
    question = scoring.ask(Choice("ab", ("cd", "e"), 0), Letters())
    assert question.context == [97, 98]
    assert question.endings == [[32, 99, 100], [32, 101]]


def test_white_space_after_the_context_goes_to_the_ending() -> None:
    assert scoring.ask(Choice("ab ", ("c", "d"), 0), Letters()).endings == [[32, 32, 99], [32, 32, 100]]


def test_a_token_over_the_border_belongs_to_the_endings() -> None:
    question = scoring.ask(Choice("ab.", ("c", "d"), 0), Letters())
    assert question.context == [97, 98]
    assert question.endings == [[0, 99], [0, 100]]


def test_bos_comes_first_if_the_tokenizer_puts_it() -> None:
    tokenizer = Letters()
    tokenizer.bos = 7
    assert scoring.ask(Choice("a", ("b", "c"), 0), tokenizer).context == [7, 97]


def test_a_task_without_context_is_a_failure() -> None:
    with pytest.raises(Failure, match="no tokens to score"):
        scoring.ask(Choice("", ("b", "c"), 0), Letters())


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_of_newcombe_1998(right: int, n: int, low: float, high: float) -> None:
    assert scoring.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = scoring.wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("within", [0.02, 0.08, 0.1, 0.3])
def test_within_is_the_number_of_tasks_that_an_interval_so_narrow_takes(within: float) -> None:
    count = Accuracy(within=within).most
    assert count

    def half(n: int) -> float:
        low, high = scoring.wilson(n // 2, n)
        return (high - low) / 2

    assert half(count) <= within * 1.001 and half(max(2, count - 2)) > within
    with pytest.raises(ValidationError, match="limit says how many already"):
        Accuracy(within=within, limit=3)
    with pytest.raises(ValidationError, match="set limit"):
        Accuracy(task="arc_easy", within=within)


def test_accuracy_is_that_of_a_plain_loop(tiny: Tiny, runtime: Runtime, tmp_path: Path) -> None:
    model = tiny() if runtime.name == "torch" else Path(_gguf(runtime, tmp_path, tiny))
    (tmp_path / "out").mkdir()
    found = measure(payload("accuracy", {"limit": 9}, model, tmp_path / "out", tiny()), silent)
    tokenizer = open_tokenizer(tiny())
    right = right_norm = 0
    for number, task in enumerate(load_choices("builtin", 9)):
        context = tokenizer.encode(task.context)
        endings = [tokenizer.encode(f"{task.context} {ending}")[len(context) :] for ending in task.endings]
        scores = np.array([score_alone(runtime, context, ending) for ending in endings])
        right += int(scores.argmax() == task.label)
        right_norm += int((scores / [len(ending) for ending in task.endings]).argmax() == task.label)
        logprobs = load_file(tmp_path / "out" / "values.safetensors")["logprobs"][number]
        assert logprobs == pytest.approx(scores, abs=0.3 if runtime.name == "llama.cpp" else 1e-2)
    assert found["accuracy"]["n"] == 9
    assert found["accuracy"]["acc"] == right / 9
    assert found["accuracy"]["acc_norm"] == right_norm / 9
    assert found["tokenizer_match"] is True


def _gguf(runtime: Runtime, folder: Path, tiny: Tiny) -> Path:
    from lighten.export.gguf import write as gguf

    gguf.write(tiny(), folder / "tiny.gguf", "F32")
    return folder / "tiny.gguf"


def test_a_local_file_stands_in_for_a_task_with_unequal_endings(tiny: Tiny, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"activity_label": "One", "ctx": "A dog", "endings": ["barks.", "meows.", "sings."], "label": 0},
        {"activity_label": "Two", "ctx": "A cat", "endings": ["barks.", "meows."], "label": 1},
    ]
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    runtime, tokenizer = open_runtime(tiny()), open_tokenizer(tiny())
    settings = Accuracy(task="hellaswag", local=str(file))
    found = scoring.measure(runtime, tokenizer, settings, silent)
    assert found.result.accuracy.task == "hellaswag"
    assert found.result.accuracy.n == 2
    assert np.isnan(found.values["logprobs"]).tolist() == [[False] * 3, [False, False, True]]
