from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lighten.errors import Failure, RequestError
from lighten.report import claims
from lighten.report.cell import Cell
from lighten.report.table import table
from lighten.results.file import FILE, load, save
from lighten.results.measured import Speed
from lighten.results.results import Results
from lighten.store import names
from lighten.store.store import Store
from tests.report.sample import raw, raw_failed, results, with_failure


@pytest.mark.parametrize("made", [results(), with_failure()])
def test_round_trip(made: Results, tmp_path: Path) -> None:
    save(made, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == made
    assert load(tmp_path) == made


def test_the_file_has_the_names_of_the_contract(tmp_path: Path) -> None:
    save(results(), tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == raw() == results().model_dump(mode="json")


def test_a_free_source_keeps_what_it_is_given() -> None:
    assert results().source.model_dump()["licence"] == "Apache-2.0"


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "results.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_missing_file_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere/results\.json.*lighten ls"):
        load(tmp_path / "nowhere" / "results.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"schema"'])
def test_what_is_not_results_is_a_failure(text: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"results\.json"):
        load(write(tmp_path, text))


def test_bytes_that_are_not_text_are_a_failure(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Failure, match="not text"):
        load(tmp_path)


def test_another_schema_says_which(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="schema 2, this lighten reads schema 1"):
        load(write(tmp_path, {**raw(), "schema": 2}))


def test_a_wrong_type_says_where(tmp_path: Path) -> None:
    value = raw()
    value["variants"][1]["perplexity"]["value"] = "29"
    value["variants"][1]["speed"][0]["batches"] = 1
    with pytest.raises(Failure) as caught:
        load(write(tmp_path, value))
    assert "variants.1.perplexity.value" in str(caught.value)
    assert "variants.1.speed.0.batches" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    wrong = raw()
    wrong["variants"][1]["perplexity"]["value"] = value
    with pytest.raises(ValidationError, match="finite"):
        Results.model_validate(wrong)


def test_a_failed_variant_must_say_why() -> None:
    wrong = raw_failed()
    wrong["variants"][2]["error"] = " "
    with pytest.raises(ValidationError, match="'nf4' failed but its error is empty"):
        Results.model_validate(wrong)


def test_names_are_unique() -> None:
    wrong = raw()
    wrong["variants"][1]["name"] = "gguf-f16"
    with pytest.raises(ValidationError, match="two variants are named 'gguf-f16'"):
        Results.model_validate(wrong)


def test_changes_are_the_paired_ones_or_else_plain() -> None:
    made = results()
    q8 = made.variants[3]
    paired = made.perplexity_change(q8)
    plain = made.perplexity_change(q8.model_copy(update={"delta": None}))
    assert paired and paired.relative == 0.0005 and paired.ci95 == (-0.0003, 0.0013)
    assert plain and plain.relative == pytest.approx(25.6161 / 25.6033 - 1) and plain.ci95 is None
    assert made.size_ratio(q8.model_copy(update={"delta": None})) == pytest.approx(144811904 / 269060552)
    assert claims.decode_ratio(made, q8.model_copy(update={"delta": None})) == pytest.approx(78.4 / 31.42)
    assert made.perplexity_change(made.variants[0]) is None


def test_reading_a_report_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, lighten.report.render; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", ["../../../x", "a/b", "", ".", "..", "-x", "/etc/x", "a\nb", "a b", "x" * 129, "a @ b/../c"]
)
def test_a_variants_name_is_none_of_a_path(name: str, tmp_path: Path) -> None:
    told = raw()
    told["variants"][1]["name"] = name
    if "@" in name:
        told["variants"][1]["facts"]["machine"] = {}
    (tmp_path / FILE).write_text(json.dumps(told))
    with pytest.raises(Failure, match=r"variants\.1: .* may hold letters, digits"):
        load(tmp_path)


def test_rows_of_another_machine_are_named_after_it(tmp_path: Path) -> None:
    name = names.elsewhere("q4", "ACME i7 / 2 GHz\x1b[0m\n")
    assert names.is_elsewhere(name)
    told = raw()
    told["variants"][1] |= {"name": name}
    with pytest.raises(ValidationError, match="may hold letters"):
        Results.model_validate(told)
    told["variants"][1]["facts"]["machine"] = {"cpu": "x"}
    assert Results.model_validate(told).variants[1].elsewhere
    for text in ("a b (1)", "../..", "💥", "x" * 400, ".hidden"):
        assert names.is_name(names.as_name(text))


def test_a_key_of_results_is_none_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "artifact.json").write_text("{}")
    assert Store(tmp_path).find("..") is None
    assert Store(tmp_path).find(str(tmp_path)) is None


def test_the_arithmetic_of_each_speed_is_in_the_table() -> None:
    made = results()
    first = made.variants[0].speed[0]
    both = [first, first.model_copy(update={"dtype": "bfloat16", "prefill_dtype": "float32"})]
    plain, shown = (_first_row(made, each) for each in both)
    assert shown["arithmetic"].text == "bfloat16, prefill float32" and plain["arithmetic"].text == first.dtype
    assert [each.arithmetic for each in both] == [first.dtype, "bfloat16, prefill float32"]


def _first_row(made: Results, speed: Speed) -> dict[str, Cell]:
    variants = [made.variants[0].model_copy(update={"speed": [speed]}), *made.variants[1:]]
    found = table(made.model_copy(update={"variants": variants}))
    return {column.name: cell for column, cell in zip(found.columns, found.rows[0].cells, strict=True)}
