"""Roofline and cost of rows that were measured, from the command and from a recipe's settings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from lighten.evaluate.roofline import peaks
from lighten.evaluate.settings import Evaluate
from lighten.pipeline import roofline
from lighten.report.roofs import draw_roofs, lines, prices, roofs
from lighten.results.results import Results
from lighten.step import silent
from tests.command import lighten

Tiny = Callable[..., Path]


def test_measured_once_and_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = roofline.machine_peaks("cpu", silent)
    assert roofline.machine_peaks("cpu", silent) == first == peaks.load("cpu")
    peaks.save(peaks.Peaks("cpu", [(1, 1.0)], {}, 0.0, "then"))
    assert roofline.machine_peaks("cpu", silent).measured == "then"
    assert roofline.machine_peaks("cpu", silent, fresh=True).measured == first.measured


def test_evaluate_places_a_model_under_the_roof_and_prices_it(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = lighten(
        *("evaluate", tiny(), "--skip", "perplexity", "--skip", "accuracy", "--roofline"),
        *("--price-per-hour", 0.40, "--currency", "EUR", "-o", out),
    )
    assert done.returncode == 0, done.stderr
    assert "EUR written" in done.stdout and "peak" in done.stdout
    results = Results.model_validate(json.loads((out / "results.json").read_text()))
    (variant,) = results.variants
    assert variant.roofline and variant.roofline.prefill and variant.cost
    speed = variant.speed[0]
    assert speed.decode_tok_s and variant.roofline.gb_s == pytest.approx(
        variant.roofline.bytes_per_token * speed.decode_tok_s / 1e9
    )
    assert variant.cost.per_million_tokens.decode == pytest.approx(0.4 / 3600 / speed.decode_tok_s * 1e6)
    assert results.machine["bandwidth_gb_s"] and results.machine["matrix_gflop_s"]
    for name in ("roofline.svg", "roofline.png"):
        assert (out / "plots" / name).stat().st_size > 1000
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "Under the roof" in html and "EUR" in html and 'aria-label="Roofline of this machine"' in html
    assert "### Under the roof" in text and "### What tokens cost" in text
    each = roofs(results)
    assert each and {mark.decode for mark in each.marks} == {True, False}
    assert draw_roofs(each)[0] == draw_roofs(each)[0]
    assert lines(results) and prices(results)


def test_both_need_a_speed() -> None:
    for settings in ({"roofline": True}, {"price_per_hour": 1.0}):
        with pytest.raises(ValidationError, match="add `speed"):
            Evaluate.model_validate(settings)
    assert Evaluate.model_validate({"roofline": True, "price_per_hour": 1.0, "speed": {}}).currency == "USD"
    with pytest.raises(ValidationError, match="greater than 0"):
        Evaluate.model_validate({"price_per_hour": 0, "speed": {}})


def test_wrong_requests_are_one_message(tiny: Tiny, tmp_path: Path) -> None:
    done = lighten("evaluate", tiny(), "--skip", "speed", "--price-per-hour", 1)
    assert done.returncode == 2 and "reckoned from measured speeds" in done.stderr
    done = lighten("evaluate", tiny(), "--profile", tmp_path)
    assert done.returncode == 2 and "exists already" in done.stderr


def test_the_profile_command_says_what_it_found(tiny: Tiny, tmp_path: Path) -> None:
    done = lighten("evaluate", tiny(), "--profile", tmp_path / "profile")
    assert done.returncode == 0, done.stderr
    assert "decode:" in done.stdout and "ui.perfetto.dev" in done.stdout and "of the time" in done.stdout
    assert (tmp_path / "profile" / "trace.json.gz").is_file()
