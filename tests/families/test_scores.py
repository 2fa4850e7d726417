"""Endings do not see each other, whatever carries states from token to token in a model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lighten.evaluate.runtimes.runtime import Question
from lighten.evaluate.runtimes.torch import TorchRuntime
from tests.families.models import make
from tests.families.trial import loaded

PACKS = {"qwen3": True, "gemma3_text": True, "lfm2": False, "mamba2": False, "qwen3_5_text": False, "falcon_h1": False}


def silent(*_: object) -> None:
    pass


@pytest.mark.parametrize("family", PACKS)
def test_scores_are_those_of_each_ending_alone(family: str, tmp_path: Path) -> None:
    make(family, tmp_path)
    runtime = TorchRuntime(tmp_path, "cpu", None)
    numbers = np.random.default_rng(0)
    questions = []
    for size in (3, 12):  # the second does not fit a window of 8
        context, *endings = (numbers.integers(3, 200, count).tolist() for count in (size, 4, 2, 3))
        questions.append(Question(context, endings))
    found = runtime.choose_many(questions, silent)
    plain = loaded(tmp_path).eval()
    for question, scores in zip(questions, found, strict=True):
        for ending, score in zip(question.endings, scores, strict=True):
            ids = torch.tensor([question.context + ending])
            with torch.no_grad():
                chances = plain(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            wanted = chances[-len(ending) :].gather(1, torch.tensor(ending)[:, None]).sum()
            assert score.logprob == pytest.approx(float(wanted), rel=1e-4)
    assert runtime._packing in (PACKS[family], None if family == "gemma3_text" else PACKS[family])
