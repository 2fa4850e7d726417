"""What a comparison says of two measurements of one speed."""

from typing import Any

import pytest

from lighten.compare.difference import compare
from lighten.compare.limits import judge, parse
from lighten.compare.side import Side
from lighten.errors import RequestError
from lighten.results.results import Variant

SPEED = {"batch": 1, "prompt": 128, "generate": 64, "spread": 0.01}
HOW = {"attention": "sdpa", "compile": "off", "cache": "dynamic"}


def notes(*changes: dict[str, Any]) -> list[str]:
    sides = []
    for text, change in zip("ab", changes, strict=True):
        row = {"name": text, "status": "ok", "key": change.pop("key", "k"), "device": "cpu"}
        row["speed"] = [{**SPEED, **HOW, "decode_tok_s": 100.0, **change}]
        sides.append(Side(text, Variant.model_validate(row), {"cpu": "x", "cores": 2}))
    return list(compare(*sides).notes)


def test_the_same_artifact_measured_twice() -> None:
    assert notes({}, {"decode_tok_s": 96.0}) == []
    (line,) = notes({}, {"decode_tok_s": 90.0})
    assert line.startswith(
        "both are the same artifact, and their decode speeds at batch 1, prompt 128 differ by 11.1 %"
    )
    assert notes({}, {"decode_tok_s": 90.0, "key": "other"}) == []


def test_speeds_with_other_options_are_named() -> None:
    (line,) = notes({}, {"decode_tok_s": 150.0, "compile": "default", "cache": "static"})
    assert line == (
        "decode speeds are of attention sdpa, compile off, cache dynamic in a and of "
        "attention sdpa, compile default, cache static in b"
    )
    assert notes({}, {"decode_tok_s": 150.0, "key": "gguf", **dict.fromkeys(HOW)}) == []


def test_noisy_speeds_are_not_compared_and_no_limit_is_judged_by_them() -> None:
    row = {**SPEED, **HOW, "decode_tok_s": 100.0, "error": 0.01}
    sides = [
        Side(text, Variant.model_validate({"name": text, "status": "ok", "device": "cpu", "speed": [each]}), {})
        for text, each in (("a", row), ("b", {**row, "decode_tok_s": 1400.0, "spread": 1.29}))
    ]
    found = compare(*sides)
    assert found.decode is None
    assert found.notes == (
        "decode speeds are not compared: the repeats of b differ by up to 129 %, so measure again on a quiet machine",
    )
    with pytest.raises(RequestError, match=r"cannot be judged.*129 %"):
        judge(parse("decode < -10%"), found)


def test_a_ratio_of_speeds_has_an_interval() -> None:
    row = {**SPEED, **HOW, "decode_tok_s": 100.0, "error": 0.02}
    sides = [
        Side(text, Variant.model_validate({"name": text, "status": "ok", "device": "cpu", "speed": [each]}), {})
        for text, each in (("a", row), ("b", {**row, "decode_tok_s": 97.0}))
    ]
    found = compare(*sides)
    assert found.decode and found.decode.ratio.ci95 == pytest.approx((97 * 0.98 / 102, 97 * 1.02 / 98))
    assert found.notes == ("the decode speeds differ by less than their intervals reach",)
    (verdict,) = judge(parse("decode < -2%"), found)
    assert verdict.failed and verdict.excluded is False
