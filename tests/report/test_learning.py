"""The curves of a distillation: drawn once for all variants behind it."""

from pathlib import Path
from typing import Any

from lighten.report.learning import lessons
from lighten.report.markdown import markdown
from lighten.report.render import write_report
from lighten.report.table import table
from lighten.results.results import Results

from .sample import raw


def taught() -> Results:
    value = raw()
    training: dict[str, Any] = {
        "curve": [{"step": n, "loss": 3 / n + 2, "ce": 3.0, "kl": 1 / n} for n in range(1, 41)],
        "validation": [{"step": n, "perplexity": 30 - n / 4 + (n > 30) * 3} for n in range(0, 41, 10)],
    }
    for name in (1, 2):
        value["variants"][name]["training"] = training
        value["variants"][name]["params"] = 105_000_000
    value["variants"][3]["training"] = {"curve": [{"step": 1, "loss": 2.0}], "validation": []}
    value["variants"][0]["params"] = 134_515_008
    return Results.model_validate(value)


def test_variants_behind_the_same_training_share_a_picture(tmp_path: Path) -> None:
    results = taught()
    names = [variant.name for variant in results.variants]
    found = lessons(results)
    assert [each.variants for each in found] == [(names[1], names[2]), (names[3],)]
    write_report(results, tmp_path)
    assert {path.name for path in (tmp_path / "plots").glob("training-*.png")} == {"training-1.png", "training-2.png"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figcaption>40 steps, loss 5.00 → 2.08; held-out perplexity 30.00 → 22.50") == 1
    assert "(kept: step 30)" in page


def test_markdown_says_what_came_of_it() -> None:
    assert "### Training" in markdown(taught())
    assert "### Training" not in markdown(Results.model_validate(raw()))


def test_weights_are_a_column_where_they_differ() -> None:
    titles = [column.title for column in table(taught()).columns]
    assert "Weights" in titles
    plain = table(Results.model_validate(raw()))
    assert "Weights" not in [column.title for column in plain.columns] and "Weights" not in plain.missing
