"""The comparison as CSV: every number as it was measured."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from lighten.report.csv_table import csv_table
from lighten.results.results import Results

from .sample import raw, raw_failed


def rows(value: dict[str, Any]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_table(Results.model_validate(value)))))


def test_numbers_are_not_rounded() -> None:
    row = rows(raw())[3]
    assert row["variant"] == "gguf-q8_0"
    numbers = {
        "size_bytes": 144_811_904,
        "perplexity": 25.6161,
        "perplexity change": 0.0005,
        "perplexity change low": -0.0003,
        "kl_p99": 0.0112,
        "acc_norm builtin": 58 / 120,
        "n builtin": 120,
        "decode_tok_s": 78.4,
        "decode_tok_s batch 4 prompt 128": 78.4 * 2.7,
        "ttft_ms p50": 149.2,
        "peak_rss_bytes": 276_300_000,
    }
    assert {name: float(row[name]) for name in numbers} == numbers
    assert "joules_per_token" not in row and "peak_vram_bytes" not in row, "what nobody has is no column"


def test_failed_and_strange_rows() -> None:
    value = raw_failed()
    value["variants"][1]["name"] = 'a @ "b", c'
    value["variants"][1]["facts"]["machine"] = {}
    found = {row["variant"]: row for row in rows(value)}
    assert 'a @ "b", c' in found
    assert "lower calibration.samples" in found["nf4"]["error"] and found["nf4"]["perplexity"] == ""
    assert {row["status"] for row in found.values()} == {"ok", "failed"}


def test_speeds_that_differ_in_more_than_the_batch_keep_apart() -> None:
    value = raw()
    value["variants"][3]["speed"] = [{**value["variants"][3]["speed"][0], "prompt": prompt} for prompt in (1, 2, 3)]
    row = rows(value)[3]
    assert {name for name in row if name.startswith("decode_tok_s")} >= {
        "decode_tok_s",
        "decode_tok_s batch 1 prompt 2",
        "decode_tok_s batch 1 prompt 3",
    }


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "＝"])
def test_text_is_no_formula_of_a_spreadsheet(start: str) -> None:
    value = raw_failed()
    text = f"{start}HYPERLINK(1)"
    value["variants"][-1] |= {"error": text}
    value["variants"][1] |= {"format": text}
    value["variants"][1]["accuracy"][0]["task"] = text
    value["variants"][1]["delta"]["perplexity"] |= {"relative": -0.5}
    table = list(csv.reader(io.StringIO(csv_table(Results.model_validate(value)))))
    assert not [cell for row in table for cell in row if cell.startswith(start) and not _is_number(cell)]
    assert any(f"'{text}" in row for row in table) and any("-0.5" in row for row in table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_no_variants() -> None:
    assert csv_table(Results.model_validate({**raw(), "variants": []})) == "variant,status,error\r\n"
