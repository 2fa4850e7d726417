"""Nothing is claimed of speeds that are noisy or overlap, nor of a variant that is better than its source."""

from __future__ import annotations

from typing import Any

import pytest

from lighten.report import claims
from lighten.report.card import _measured
from lighten.report.csv_table import csv_table
from lighten.report.headline import headline
from lighten.report.history import history
from lighten.report.markdown import markdown
from lighten.report.plots import draw, plots
from lighten.report.table import table
from lighten.results.results import Results

from .sample import raw

Q8 = 3


def of(value: dict[str, Any]) -> Results:
    return Results.model_validate(value)


def noisy(*rows: int, spread: float = 1.29) -> dict[str, Any]:
    """The sample, the repeats of some rows differing by 129 %."""
    value = raw()
    for row in rows:
        value["variants"][row]["speed"][0] |= {"spread": spread, "error": spread / 3}
    return value


def moved(relative: float, ci95: list[float] | None, row: int = Q8) -> dict[str, Any]:
    """The sample, the perplexity of a row changed against the baseline's."""
    value = raw()
    value["variants"][row]["perplexity"]["value"] = 25.6033 * (1 + relative)
    value["variants"][row]["delta"]["perplexity"] |= {"relative": relative, "ci95": ci95}
    return value


def cells(results: Results, name: str) -> dict[str, Any]:
    shown = table(results)
    at = [column.name for column in shown.columns].index(name)
    return {row.variant.name: row.cells[at] for row in shown.rows}


@pytest.mark.parametrize("row", [0, Q8])
def test_a_noisy_speed_has_no_ratio_anywhere(row: int) -> None:
    results = of(noisy(row))
    name = results.variants[row].name
    answer = headline(results)
    assert answer.verdict == "Perhaps gguf-q8_0" and "×" not in answer.cost
    assert "decode speeds too noisy to compare" in answer.cost
    assert f"not compared: {name} (129 %). Measure again" in answer.reason
    assert cells(results, "decode")["gguf-q8_0"].details == ()
    assert cells(results, "decode")[name].text.startswith("≈")
    line = csv_table(results).splitlines()[1 + Q8]
    assert str(78.4) in line and str(78.4 / 31.42) not in line
    text = "\n".join(_measured(results, results.variants[Q8]))
    assert f"{name} (129 %)" in text and "2.5×" not in text
    assert any(f"{name} (129 %)" in note for note in table(results).notes)


def test_a_noisy_speed_is_not_compared_however_narrow_its_interval_is() -> None:
    value = raw()
    value["variants"][Q8]["speed"][0] |= {"spread": 1.29, "error": 0.001}
    results = of(value)
    ours, base = results.variants[Q8].speed[0], results.variants[0].speed[0]
    assert not claims.faster(ours, base) and not claims.faster(base, ours)
    assert claims.decode_ratio(results, results.variants[Q8]) is None


def test_steady_speeds_have_one_everywhere() -> None:
    results = of(raw())
    assert headline(results).verdict == "Ship gguf-q8_0" and "2.5×" in headline(results).cost
    assert cells(results, "decode")["gguf-q8_0"].details == ("2.5×",)
    assert str(78.4 / 31.42) in csv_table(results)
    assert "2.5×" in "\n".join(_measured(results, results.variants[Q8])) and table(results).notes == ()


def test_speeds_whose_intervals_overlap_have_no_ratio() -> None:
    value = raw()
    value["variants"][Q8]["speed"][0] |= {"decode_tok_s": 32.0}
    results = of(value)
    assert claims.decode_ratio(results, results.variants[Q8]) is None
    assert "the same decode speed within the intervals" in headline(results).cost
    assert headline(results).verdict == "Ship gguf-q8_0", "its size and quality are sure"
    value["variants"][Q8]["speed"][0] |= {"decode_tok_s": 33.0}
    assert claims.decode_ratio(of(value), of(value).variants[Q8]) == pytest.approx(33 / 31.42)


def test_what_repeats_spread_stands_in_for_an_interval() -> None:
    value = raw()
    for row in value["variants"]:
        row["speed"][0] |= {"decode_tok_s": 100.0, "spread": 0.08, "error": None}
    value["variants"][Q8]["speed"][0] |= {"decode_tok_s": 108.0}
    assert claims.decode_ratio(of(value), of(value).variants[Q8]) is None
    value["variants"][Q8]["speed"][0] |= {"decode_tok_s": 109.0}
    assert claims.decode_ratio(of(value), of(value).variants[Q8]) == pytest.approx(1.09)


def test_speeds_of_other_lengths_have_no_ratio() -> None:
    value = raw()
    value["variants"][Q8]["speed"][0] |= {"prompt": 512}
    value["variants"][Q8]["speed"].pop()
    assert claims.decode_ratio(of(value), of(value).variants[Q8]) is None


def test_a_noisy_speed_is_no_point_of_the_front_and_not_the_best() -> None:
    fastest = 4
    results = of(noisy(fastest))
    speed = plots(results)[1]
    assert [speed.points[i].name for i in speed.front()] == ["gguf-q8_0"]
    svg, _ = draw(speed)
    assert b"not compared" in svg and b"not compared" not in draw(plots(of(raw()))[1])[0]
    assert not any(cell.best for cell in cells(results, "decode").values()), "who is the fastest is not known"
    assert cells(of(raw()), "decode")["gguf-q4_k_m"].best
    assert [cell.best for cell in cells(of(noisy(1)), "decode").values()] == [False] * 4 + [True]
    assert not any("Fastest" in line for line in headline(results).others)


def test_speeds_that_overlap_are_as_good() -> None:
    value = raw()
    value["variants"][Q8]["speed"][0]["decode_tok_s"] = 95.0
    best = [name for name, cell in cells(of(value), "decode").items() if cell.best]
    assert best == ["gguf-q8_0", "gguf-q4_k_m"]
    speed = plots(of(value))[1]
    assert [speed.points[i].name for i in speed.front()] == ["gguf-q8_0"], "as fast, and better"


def test_nothing_is_shipped_on_an_interval_that_reaches_too_far() -> None:
    answer = headline(of(moved(0.0005, [-0.4, 0.4])))
    assert answer.verdict == "Perhaps gguf-q8_0" and "reaches +40 %" in answer.reason
    answer = headline(of(moved(0.004, [-0.03, 0.039])))
    assert answer.verdict == "Perhaps gguf-q8_0" and "reaches +3.9 %" in answer.reason
    answer = headline(of(moved(0.0005, None)))
    assert answer.verdict == "Perhaps gguf-q8_0" and "Without an interval" in answer.reason


def test_a_larger_variant_that_surely_fits_is_shipped_instead() -> None:
    answer = headline(of(moved(0.008, [-0.02, 0.036], row=4)))
    assert answer.verdict == "Ship gguf-q8_0" and "with its whole interval" in answer.reason
    assert answer.others[0].startswith("Smallest: gguf-q4_k_m") and "reaches +3.6 %" in answer.others[0]


def test_a_variant_that_is_better_than_its_source_is_a_bug_and_said_to_be() -> None:
    results = of(moved(-0.18, [-0.20, -0.16]))
    answer = headline(results)
    assert answer.verdict == "Closest is gguf-q4_k_m"
    told = "gguf-q8_0 is better than the baseline by more than the interval (−18.0 % [−20.0, −16.0])"
    assert any(line.startswith(told) and "something is wrong" in line for line in answer.others)
    assert any(note.startswith(told) for note in table(results).notes)
    assert told in markdown(results) and told in "\n".join(_measured(results, results.variants[Q8]))
    for plot in plots(results):
        assert "gguf-q8_0" not in [plot.points[i].name for i in plot.front()]
    for name in ("perplexity", "change"):
        assert not any(cell.best for cell in cells(results, name).values())


def test_where_every_variant_is_too_good_none_is_picked() -> None:
    value = moved(-0.18, [-0.20, -0.16])
    value["variants"] = [value["variants"][0], value["variants"][Q8]]
    answer = headline(of(value))
    assert answer.verdict == "Check gguf-q8_0" and answer.pick is None and answer.others == ()
    assert "something is wrong" in answer.reason


@pytest.mark.parametrize(
    ("relative", "ci95", "wrong"),
    [
        (-0.0002, [-0.0003, -0.0001], False),  # the arithmetic of another runtime
        (-0.18, [-0.40, 0.04], False),  # not beyond its interval
        (-0.18, None, True),
        (-0.005, None, False),
        (-0.01, [-0.015, -0.005], True),
    ],
)
def test_how_much_better_is_too_good(relative: float, ci95: list[float] | None, wrong: bool) -> None:
    results = of(moved(relative, ci95))
    assert claims.too_good(results, results.variants[Q8]) is wrong


def test_a_variant_that_was_trained_may_be_better() -> None:
    value = moved(-0.18, [-0.20, -0.16])
    value["variants"][Q8]["steps"].insert(0, {"distill": {"lora": 16}})
    assert headline(of(value)).verdict == "Ship gguf-q8_0"


def test_a_perplexity_of_another_protocol_is_in_no_plot() -> None:
    value = raw()
    value["variants"][Q8]["delta"]["perplexity"] = None
    value["variants"][Q8]["perplexity"]["protocol"] = {**value["variants"][Q8]["perplexity"]["protocol"], "length": 64}
    assert all(point.name != "gguf-q8_0" for plot in plots(of(value)) for point in plot.points)


def test_history_does_not_join_a_noisy_speed() -> None:
    part = history(of(noisy(Q8)), [of({**raw(), "version": "v2"})])
    assert part and any("Decode in v3 of gguf-q8_0: repeats differ too much" in note for note in part.notes)
