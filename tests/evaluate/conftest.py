"""Tiny models on both runtimes, and a brute-force way to score text."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lighten.evaluate.measurement import MEASUREMENTS
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.runtime import Floats, Runtime
from lighten.export.gguf import write as export

Tiny = Callable[..., Path]


def payload(
    name: str, settings: dict[str, Any], model: Path, out: Path, tokenizer: Path | None = None, **more: Any
) -> dict[str, Any]:
    """A request for a measurement as it goes through the wall between processes."""
    made = MEASUREMENTS.load(name).model_validate(settings)
    return Request(made, model, tokenizer or model, out, device="cpu", trust_remote_code=False, **more).payload()


@pytest.fixture(scope="session")
def tiny_gguf(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    export.write(tiny(), file, "F32")
    return file


@pytest.fixture(scope="session")
def tiny_bos(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts BOS first."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(tiny("llama", "spm"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(params=["torch", "llama.cpp"])
def runtime(request: pytest.FixtureRequest, tiny: Tiny, tiny_gguf: Path) -> Iterator[Runtime]:
    opened = open_runtime(tiny() if request.param == "torch" else tiny_gguf)
    assert opened.name == request.param
    yield opened
    opened.close()


def log_softmax(logits: Floats) -> np.ndarray:
    """The textbook formula in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def score_alone(runtime: Runtime, context: list[int], ending: list[int]) -> float:
    """Log-probability of an ending, from one sequence that holds nothing else."""
    logprobs = log_softmax(runtime.logits(np.array(context + ending)))
    places = range(len(context) - 1, len(context) + len(ending) - 1)
    return float(sum(logprobs[place, token] for place, token in zip(places, ending, strict=True)))
