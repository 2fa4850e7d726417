"""What a comparison says of two measurements of one speed."""

from typing import Any

from lighten.comparison.difference import compare
from lighten.comparison.side import Side
from lighten.report.results import Variant

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
