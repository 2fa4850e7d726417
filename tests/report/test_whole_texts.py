"""The answer for encoders and translation models, which have no perplexity."""

from typing import Any

import pytest

from lighten.report.headline import headline
from lighten.report.markdown import markdown
from lighten.report.render import html
from lighten.report.whole_texts import instead
from lighten.results.results import Results

from .sample import raw

Rows = dict[str, dict[str, Any]]


def results(rows: Rows) -> Results:
    """Returns results with the sizes of the sample's baseline and its two smallest variants, and nothing but `rows`."""
    value = raw()
    places = {"baseline": 0, "int8": 3, "small": 4}
    variants = []
    for name, own in rows.items():
        row = value["variants"][places[name]]
        row |= {"perplexity": None, "other_perplexity": [], "accuracy": [], "speed": [], "delta": None}
        row |= {"name": name, "divergence": None, **own}
        variants.append(row)
    return Results.model_validate({**value, "variants": variants})


def alike(mean: float, least: float) -> dict[str, Any]:
    return {"similarity": {"mean": mean, "p05": least, "least": least, "n": 500}}


def rate(second: float) -> dict[str, Any]:
    times = {"p50": 1.0, "p95": 1.0, "p99": 1.0}
    return {"sentences": [{"batch": 1, "n": 64, "latency_ms": times, "sentences_s": second, "repeats": 2}]}


def bleu(value: float, half: float = 0.1) -> dict[str, Any]:
    return {"translation": {"bleu": value, "chrf": 70.0, "n": 200, "ci95": [value - half, value + half]}}


def filled(acc: float) -> dict[str, Any]:
    return {"masked": {"acc": acc, "n": 900, "ci95": [acc - 0.001, acc + 0.001]}}


def test_the_cosine_and_the_sentences_a_second_decide() -> None:
    found = results({"baseline": rate(20), "int8": {**alike(0.9977, 0.9943), **rate(50)}, "small": alike(0.97, 0.9)})
    answer = headline(found)
    assert (answer.verdict, answer.pick) == ("Ship int8", "int8")
    assert answer.cost.endswith("cosine 0.9977, at least 0.9943, 2.5× the sentences a second (batch 1)")
    assert answer.reason == "It is the smallest variant that keeps all but 1 % of what was measured on whole texts."
    assert len(answer.others) == 1 and "small, " in answer.others[0] and "cosine 0.9700" in answer.others[0]


def test_none_is_near_enough() -> None:
    answer = headline(results({"baseline": {}, "int8": alike(0.98, 0.9), "small": alike(0.97, 0.9)}))
    assert (answer.verdict, answer.pick) == ("Closest is int8", "int8")
    assert "keeps all but 1 %" in answer.reason


@pytest.mark.parametrize(
    ("base", "own", "verdict", "words"),
    [
        (bleu(60.0), bleu(59.9), "Ship int8", "BLEU 59.9 instead of 60.0"),
        (bleu(60.0), bleu(59.9, half=2.0), "Perhaps int8", "BLEU 59.9 instead of 60.0"),
        (bleu(60.0), bleu(55.0), "Closest is int8", "BLEU 55.0 instead of 60.0"),
        (filled(0.5), filled(0.499), "Ship int8", "49.9 % of gaps filled instead of 50.0 %"),
    ],
)
def test_what_is_lost_is_a_share_of_the_baselines(
    base: dict[str, Any], own: dict[str, Any], verdict: str, words: str
) -> None:
    answer = headline(results({"baseline": base, "int8": own}))
    assert answer.verdict == verdict
    assert words in answer.cost
    assert ("Its 95 % interval" in answer.reason) == (verdict == "Perhaps int8")


def test_the_report_says_what_was_measured_instead_of_perplexity() -> None:
    found = results({"baseline": rate(20), "int8": {**alike(0.9977, 0.9943), **rate(50)}})
    said = instead(found)
    assert said == (
        "Measured: the speed of 64 sentences and the cosine of the embeddings of 500 sentences to the baseline's."
    )
    assert f"- {said}" in markdown(found)
    page = html(found, {})
    assert "embeddings of 500 sentences" in page and "Perplexity was not measured" not in page
    assert instead(results({"baseline": {}})) == ""
    assert "Perplexity was not measured." in html(results({"baseline": {}}), {})
