"""One artifact measured in several ways, and what a runtime that is missing or dies leaves behind."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.errors import RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.speed.settings import Speed
from lighten.evaluate.speed.shapes import measure
from lighten.pipeline import build
from lighten.pipeline.build import check_options
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse
from lighten.process.isolate import Outcome, run_isolated
from tests.cli.test_main import refused
from tests.command import lighten as command

pytestmark = pytest.mark.usefixtures("warm_timings")
HOW = ("attention", "cache")
SPEED = {"prompt": 16, "generate": 4, "repeats": 2}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


def ladder(model: Path, options: dict[str, Any], **variants: Any) -> dict[str, Any]:
    return {
        "name": "ladder",
        "model": str(model),
        "variants": {"static": [], "flash": [], "q8": [{"export": {"format": "gguf", "type": "Q8_0"}}], **variants},
        "evaluate": {"perplexity": {"length": 64, "samples": 3}, "speed": {**SPEED, "options": options}},
    }


def test_one_artifact_is_measured_in_several_ways_and_its_quality_once(model: Path, tmp_path: Path) -> None:
    value = ladder(model, {"*": {"attention": "eager"}, "static": {"cache": "static"}, "flash": {"attention": "flash"}})
    todo = make_plan(parse(value))
    names = [stage.name for stage in todo.stages if stage.measure]
    assert names == ["perplexity of baseline", *(f"speed of {name}" for name in ("baseline", "static", "flash"))] + [
        f"{what} of q8" for what in ("perplexity", "speed")
    ]
    results = json.loads((lighten.run(parse(value), artifacts=tmp_path, device="cpu") / "results.json").read_text())
    rows = {row["name"]: row for row in results["variants"]}
    assert rows["baseline"]["key"] == rows["static"]["key"] == rows["flash"]["key"]
    told = {name: [row["speed"][0].get(key) for key in HOW] for name, row in rows.items() if "speed" in row}
    assert told == {"baseline": ["eager", "dynamic"], "static": ["eager", "static"], "q8": [None, None]}
    assert [name for name, row in rows.items() if row["status"] == "failed"] == ["flash"]
    assert rows["flash"]["error"].startswith("speed of flash: flash attention runs on an NVIDIA GPU")
    assert rows["static"]["perplexity"] == rows["baseline"]["perplexity"]


def dies(payload: dict[str, Any], report: Any) -> None:
    """Measures a speed, and is killed before it has told it."""
    measure(open_runtime(Path(payload["model"])), Speed(**payload["settings"]), report)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_runtime_that_dies_is_one_failed_row_and_the_rest_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_dies(target: str, payload: dict[str, Any], *rest: Any, **fresh: Any) -> Outcome:
        deadly = payload.get("measurement") == "speed" and payload["settings"]["cache"] == "static"
        return run_isolated("tests.pipeline.test_ladder:dies" if deadly else target, payload, *rest)

    monkeypatch.setattr(build, "run_isolated", one_dies)
    value = parse(ladder(model, {"static": {"cache": "static"}}))
    results = json.loads((lighten.run(value, artifacts=tmp_path, device="cpu") / "results.json").read_text())
    rows = {row["name"]: row for row in results["variants"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "baseline": "ok",
        "static": "failed",
        "flash": "ok",
        "q8": "ok",
    }
    assert "killed by SIGKILL" in rows["static"]["error"] and rows["static"]["perplexity"]["value"] > 1
    assert rows["q8"]["speed"][0]["decode_tok_s"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"flsh": {"attention": "flash"}},
            "speed.options.flsh: there is no such variant; did you mean 'flash'",
        ),
        ({"flash": {"attention": "fast"}}, "must be 'eager', 'sdpa' or 'flash', not 'fast'"),
        ({"flash": {"compile": "default", "cache": "quantized"}}, "flash: a quantized cache cannot be compiled"),
        ({"q8": {"cache": "static"}}, "q8 is exported to another runtime"),
    ],
)
def test_wrong_options_are_refused(model: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_plan(parse(ladder(model, options)))
    assert words in str(caught.value)


def test_options_for_all_that_a_machine_has_not_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="flash attention runs on an NVIDIA GPU"):
        check_options(Speed(attention="flash"), "cpu")
    done = command("evaluate", model, "--attention", "flash", "--device", "cpu", cwd=tmp_path)
    refused(done, 2, "flash attention runs on an NVIDIA GPU", "choose attention sdpa")
    done = command("evaluate", model, "--attention", "fast", cwd=tmp_path)
    refused(done, 2, "attention", "'eager', 'sdpa' or 'flash'")


def test_a_speed_beyond_the_context_is_refused(model: Path) -> None:
    value = ladder(model, {})
    value["evaluate"]["speed"] = {"prompt": [16, 500], "generate": 20}
    with pytest.raises(RequestError, match="500 prompt and 20 generated tokens are more than the 512 positions"):
        make_plan(parse(value))


def test_the_flags_of_evaluate(model: Path, tmp_path: Path) -> None:
    flags = ("--attention", "eager", "--cache", "static", "--skip", "perplexity", "--skip", "accuracy", "--json")
    done = command("evaluate", model, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["variants"][0]["speed"]
    assert (row["attention"], row["compile"], row["cache"]) == ("eager", "off", "static")
