from typing import Any

import pytest

from lighten.report.serving import doubts, load_lines, serving
from lighten.report.table import table
from lighten.results.results import Results
from tests.report.sample import raw


def results(*changes: dict[str, Any]) -> Results:
    """Results of one artifact that was measured several times, 100 tok/s unless it is said."""
    speed = {"batch": 1, "prompt": 128, "generate": 64, "decode_tok_s": 100.0}
    rows = []
    for number, change in enumerate(changes):
        row = {"name": f"r{number}", "status": "ok", "key": "a" * 64, "device": "cpu", **change}
        rows.append(row | {"speed": [speed | change.get("speed", {})]})
    return Results.model_validate({**raw(), "variants": rows})


def test_two_measurements_of_the_same_that_differ_are_told() -> None:
    assert doubts(results({}, {"speed": {"decode_tok_s": 104.9}})) == ()
    (line,) = doubts(results({}, {"speed": {"decode_tok_s": 94.0}}))
    assert line.startswith("r0 and r1 are the same, and their decode speeds at batch 1, prompt 128 differ by 6.4 %")
    assert line in table(results({}, {"speed": {"decode_tok_s": 94.0}})).notes
    by_path = [{"key": None, "path": "m", "speed": {"decode_tok_s": value}} for value in (100.0, 90.0)]
    assert len(doubts(results(*by_path))) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"key": "b" * 64},
        {"device": "cuda"},
        {"facts": {"machine": {"cpu": "another"}}},
        {"speed": {"prompt": 64, "decode_tok_s": 50.0}},
        {"speed": {"compile": "default", "decode_tok_s": 50.0}},
    ],
)
def test_what_is_not_the_same_is_not_compared(other: dict[str, Any]) -> None:
    changed = {"speed": {"decode_tok_s": 50.0}} | other
    assert doubts(results({}, changed)) == ()


def test_load_and_drafts_are_tables() -> None:
    times = {"p50": 120.0, "p95": 300.0, "p99": 410.0}
    load = {"rate": 0.5, "requests": 16, "completed": 15, "throughput_tok_s": 31.2, "server": "llama_cpp.server 0.3"}
    draft = {"draft": "q4", "tokens": 5, "acceptance": 0.81, "decode_tok_s": 60.0, "plain_tok_s": 40.0, "speedup": 1.5}
    rows = results({"load": [load | {"ttft_ms": times, "token_ms": times}], "speculative": draft | {"identical": True}})
    part = serving(rows, [])
    assert part is not None and part.notes == ()
    loads, drafts = part.grids
    each = "120, 300, 410"
    assert loads.rows == (("r0", "0.5", "15 of 16", "31.2", each, each, "llama_cpp.server 0.3"),)
    assert drafts.rows == (("r0", "q4", "5", "81.0", "60.0", "40.0", "1.5×", "all"),)
    assert all(len(grid.heads) == len(grid.rows[0]) for grid in part.grids)
    parted = {"parted": [{"text": 0, "position": 7, "gap": 0.0312}], "texts": 6, "identical": False}
    part = serving(results({"speculative": draft | parted}), [])
    assert part is not None
    assert part.grids[0].rows[0][-1] == "all but 1 of 6"
    assert part.notes == ("r0: texts part where the two likeliest logits differ by 0.031 at most",)
    assert serving(results({}), []) is None


def test_users_and_their_errors_are_told() -> None:
    times = {"p50": 120.0, "p95": 300.0, "p99": 410.0}
    load = {"concurrency": 8, "requests": 16, "completed": 13, "throughput_tok_s": 31.2, "server": "there"}
    found = results({"load": [load | {"ttft_ms": times, "errors": {"503 no room": 2, "no answer": 1}}]})
    part = serving(found, [])
    assert part is not None
    assert part.grids[0].rows == (("r0", "8 at once", "13 of 16", "31.2", "120, 300, 410", "–", "there"),)
    failed = "r0: 3 of 16 requests failed: 2 × 503 no room; 1 × no answer"
    assert part.notes == (failed,)
    line = "r0, 8 users: 13 of 16 answered, 31.2 tok/s, first token 120 ms (p50)"
    assert load_lines(found) == (line, failed)
