from __future__ import annotations

from typing import Any

from lighten.recommend.choose import choose
from lighten.recommend.question import ask
from lighten.report.headline import headline
from lighten.report.plots import plots
from lighten.report.table import table
from lighten.results.results import Results

from .sample import raw, raw_failed


def of(value: dict[str, Any]) -> Any:
    return headline(Results.model_validate(value))


def test_the_smallest_within_one_percent() -> None:
    answer = of(raw())
    assert answer.pick == "gguf-q8_0"
    assert answer.sentence == ("Ship gguf-q8_0: 145 MB instead of 269 MB, +0.05 % perplexity, 2.5× the decode speed.")
    assert answer.others == (
        "Smallest: gguf-q4_k_m, 105 MB instead of 269 MB, +3.3 % perplexity, 3.1× the decode speed.",
    )


def test_a_wide_interval_is_said() -> None:
    value = raw()
    value["variants"][3]["delta"]["perplexity"]["ci95"] = [-0.02, 0.021]
    assert "reaches +2.1 %" in of(value).reason


def test_none_within_one_percent() -> None:
    value = raw()
    del value["variants"][3]
    answer = of(value)
    assert answer.verdict == "Closest is gguf-q4_k_m"
    assert answer.reason == "No variant that is smaller stays within 1 % of the baseline's perplexity."


def test_failures_are_counted() -> None:
    assert "1 of 6 variants failed: nf4." in of(raw_failed()).others


def test_every_variant_failed() -> None:
    value = raw_failed()
    value["variants"] = value["variants"][2:3]
    answer = of(value)
    assert answer.pick is None and answer.verdict == "Every variant failed"


def test_only_the_baseline() -> None:
    value = raw()
    value["variants"] = value["variants"][:1]
    assert of(value).sentence == "Measured baseline: 269 MB, perplexity 25.60."
    assert of({**value, "variants": []}).verdict == "Nothing to ship"


def test_one_model_without_a_baseline() -> None:
    value = raw()
    value["variants"] = value["variants"][3:4]
    answer = of(value)
    assert answer.sentence == "Measured gguf-q8_0: 145 MB, perplexity 25.62." and answer.pick is None


def test_without_a_baseline_the_best_perplexity_stands_in() -> None:
    value = raw()
    del value["variants"][0]
    answer = of(value)
    assert answer.pick == "gguf-q8_0"
    assert "there is no baseline" in answer.reason
    assert "instead of" not in answer.cost and "perplexity 25.62" in answer.cost


def test_without_perplexity_nothing_is_claimed_about_quality() -> None:
    value = raw()
    for variant in value["variants"]:
        variant["perplexity"] = variant["delta"] = None
    answer = of(value)
    assert answer.verdict == "Smallest is gguf-q4_k_m"
    assert "quality is not known" in answer.reason


def test_nothing_is_smaller() -> None:
    value = raw()
    value["variants"] = [value["variants"][0], value["variants"][2]]
    assert of(value).verdict == "Nothing smaller"


def test_a_broken_variant_is_not_offered() -> None:
    value = raw()
    value["variants"][4]["delta"]["perplexity"].update(relative=40.0, ci95=None)
    assert not any("gguf-q4_k_m" in line for line in of(value).others)


def of_another_vocabulary() -> dict[str, Any]:
    """The third and all later variants have other tokens; by number their perplexities would be the best."""
    value = raw()
    for row in value["variants"]:
        row["perplexity"]["bits_per_byte"] = 0.9
    for row in value["variants"][3:]:
        row["vocabulary"] = "9 and 7 tokens, the first that differs is id 1: 'a' and 'b'"
        row["perplexity"] |= {"value": 9.0, "bits_per_byte": 1.25, "protocol": {**row["perplexity"]["protocol"]}}
        row["perplexity"]["protocol"]["ids_sha256"] = "of others"
        row["delta"] = row["divergence"] = None
    return value


def test_perplexities_of_other_vocabularies_are_not_compared() -> None:
    value = of_another_vocabulary()
    results = Results.model_validate(value)
    other = results.variants[3]
    assert results.perplexity_change(other) is None
    assert of(value).pick not in {row.name for row in results.variants[3:]}
    value["variants"] = [value["variants"][0], *value["variants"][3:]]
    answer = of(value)
    assert answer.verdict.startswith("Smallest is")
    assert "vocabulary is not the baseline's" in answer.reason
    assert "1.250 bits per byte instead of 0.9000" in answer.cost
    shown = table(results)
    titles = [column.title for column in shown.columns]
    cells = shown.rows[3].cells
    assert cells[titles.index("Bits/byte")].value == 1.25
    assert not any(row.cells[titles.index("Perplexity")].best for row in shown.rows)
    assert cells[titles.index("Δ perplexity")].value is None
    assert all(point.name != other.name for plot in plots(results) for point in plot.points)
    plain = [column.title for column in table(Results.model_validate(raw())).columns]
    assert "Bits/byte" not in plain


def test_without_a_baseline_other_tokens_are_not_compared_either() -> None:
    value = of_another_vocabulary()
    value["variants"] = value["variants"][1:]
    assert of(value).pick not in {row["name"] for row in value["variants"] if row["vocabulary"]}


def test_recommending_leaves_out_what_cannot_be_compared() -> None:
    results = Results.model_validate(of_another_vocabulary())
    choice = choose(results, ask(max_ppl="+50%", prefer="size"), None)
    removed = [line for each in choice.filters for line in each.removed]
    name = results.variants[3].name
    assert f"{name}: its perplexity is that of another vocabulary, which cannot be compared" in removed
    assert choice.pick and not choice.pick.row.vocabulary
