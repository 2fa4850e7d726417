"""What a recipe's calibration text shares with what it is measured on, from the recipe to the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.data.overlap import overlap
from lighten.data.text import builtin_text
from lighten.pipeline.calibration import describe
from lighten.pipeline.recipe import parse
from lighten.step import silent


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


def block(model: Path, calibration: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    return describe({"model": str(model), "calibration": calibration, "evaluate": evaluate}, silent)


def test_the_builtin_sets_do_not_overlap(model: Path) -> None:
    made = block(model, {"samples": 10_000, "length": 64}, perplexity={}, accuracy={"task": "builtin"})
    assert [(each["with"], each["share"]) for each in made["overlap"]] == [
        ("perplexity builtin", 0.0),
        ("accuracy builtin", 0.0),
    ]
    assert made["samples"] < made["asked"] == 10_000
    assert made["tokens"] == made["samples"] * 64
    assert 100 < made["distinct"] < made["vocabulary"]


def test_only_the_part_that_is_used_counts(model: Path, tmp_path: Path) -> None:
    """The sweep spreads its samples over the text, so a second half that is never read overlaps nothing."""
    used, unused = builtin_text("calibration")[:8000], builtin_text("perplexity")[:6000]
    (tmp_path / "calibration.txt").write_text(used + unused)
    (tmp_path / "test.txt").write_text(unused)
    given = {"data": str(tmp_path / "calibration.txt"), "length": 64}
    perplexity = {"data": str(tmp_path / "test.txt")}
    one = block(model, {**given, "samples": 1}, perplexity=perplexity)["overlap"][0]
    assert (one["with"], one["share"]) == ("perplexity test.txt", 0.0)
    everything = block(model, {**given, "samples": 10_000}, perplexity=perplexity)["overlap"][0]
    assert everything["share"] > 0.9
    assert overlap(used + unused, everything["examples"][:1]).share


def test_only_the_chunks_that_are_scored_count(model: Path, tmp_path: Path) -> None:
    text = builtin_text("perplexity")[:6000]
    (tmp_path / "text.txt").write_text(builtin_text("calibration")[:3000] + text)
    perplexity = {"data": str(tmp_path / "text.txt"), "length": 32, "samples": 4}
    made = block(model, {"samples": 10_000, "length": 64}, perplexity=perplexity)
    assert made["overlap"][0]["share"] > 0.9  # the first 128 tokens are calibration text


def test_a_run_says_what_overlaps_and_a_cached_one_does_not_look_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test.txt").write_text(builtin_text("calibration")[:3000])
    value = {
        "name": "leak",
        "model": str(model),
        "calibration": {"samples": 10_000, "length": 64},
        "variants": {"int4": [{"quantize": {"bits": 4, "group_size": 32}}]},
        "evaluate": {"perplexity": {"data": str(tmp_path / "test.txt"), "length": 64, "samples": 4}},
    }
    folder = lighten.run(parse(value), artifacts=tmp_path / "a")
    calibration = json.loads((folder / "results.json").read_text())["calibration"]
    assert calibration["overlap"][0]["share"] > 0.9
    for report in ("report.md", "report.html"):
        assert "Calibration overlaps perplexity test.txt" in (folder / report).read_text()

    monkeypatch.setattr("lighten.pipeline.run._calibration", lambda *_: pytest.fail("looked again"))
    assert lighten.run(parse(value), artifacts=tmp_path / "a") == folder


def test_no_calibration_no_section(model: Path, tmp_path: Path) -> None:
    value = {"name": "none", "model": str(model), "variants": {"f16": [{"export": {"format": "gguf", "type": "F16"}}]}}
    folder = lighten.run(parse(value), artifacts=tmp_path / "a")
    assert json.loads((folder / "results.json").read_text())["calibration"] is None
    assert "### Calibration" not in (folder / "report.md").read_text()
