from typing import Any

from lighten.report import claims, merge
from lighten.report.headline import headline
from lighten.report.markdown import markdown
from lighten.results.results import Results
from tests.report.sample import results


def there(**row: Any) -> Results:
    speed = {"batch": 1, "prompt": 128, "generate": 64, "decode_tok_s": 9999.0}
    variant = {
        "name": "q4",
        "status": "ok",
        "size_bytes": 1000,
        "speed": [speed],
        "perplexity": {"value": 2.5, "protocol": {"data": "perplexity.txt of the bundle"}},
        **row,
    }
    return Results.model_validate(
        {
            "recipe": "bench",
            "version": "",
            "created": "2026-01-01T00:00:00+00:00",
            "machine": {"name": "Raspberry Pi 5 Model B", "cpu": "Cortex-A76"},
            "source": {"model": "m"},
            "variants": [variant],
        }
    )


def test_rows_of_another_machine_are_named_after_it_and_compared_with_nothing() -> None:
    before = results()
    merged = merge.add(before, [there()])
    assert merged.variants[: len(before.variants)] == before.variants
    row = merged.variants[-1]
    assert row.name == "q4 @ Raspberry Pi 5 Model B" and row.elsewhere
    assert row.facts["machine"] == {"name": "Raspberry Pi 5 Model B", "cpu": "Cortex-A76"}
    assert claims.decode_ratio(merged, row) is None and merged.perplexity_change(row) is None
    assert row.notes == ["perplexity 2.500 on perplexity.txt of the bundle"]
    assert headline(merged) == headline(before)
    assert "q4 @ Raspberry Pi 5 Model B" in markdown(merged)
    assert Results.model_validate_json(merged.model_dump_json(by_alias=True)) == merged


def test_the_same_again_replaces_it() -> None:
    merged = merge.add(merge.add(results(), [there()]), [there(size_bytes=2000)])
    assert [row.size_bytes for row in merged.variants if row.elsewhere] == [2000]


def test_a_row_keeps_its_machine_when_it_is_merged_again() -> None:
    once = merge.add(results(), [there()])
    again = merge.add(results(), [once])
    row = next(each for each in once.variants if each.elsewhere)
    assert row in again.variants
