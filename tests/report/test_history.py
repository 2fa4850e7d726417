"""Versions side by side: what is joined, and what is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lighten.report.history import history, measures, read
from lighten.report.markdown import markdown, part_text
from lighten.results.results import Results

from .sample import raw
from .test_render import Page


def versions(*changes: dict[str, Any]) -> list[Results]:
    """One version for every change; a change names what is put over the sample's first variant, or a whole section."""
    made = []
    for number, change in enumerate(changes, 1):
        value = copy.deepcopy(raw())
        value["version"] = f"v{number}"
        for name, new in change.items():
            if name in ("machine", "source"):
                value[name] |= new
            else:
                value["variants"][3][name] = new
        made.append(Results.model_validate(value))
    return made


def variant(name: str) -> Any:
    return copy.deepcopy(raw()["variants"][3][name])


def line(found: list[Results], title: str, name: str = "gguf-q8_0") -> list[tuple[float | None, str]]:
    measure = next(each for each in measures(found) if each.title == title)
    return [(point.value, point.why) for point in measure.lines[name]]


def test_numbers_over_versions() -> None:
    better = variant("perplexity") | {"value": 25.5}
    found = versions({}, {"perplexity": better, "size_bytes": 140_000_000})
    assert line(found, "Perplexity") == [(25.6161, ""), (25.5, "")]
    assert line(found, "Size") == [(144_811_904.0, ""), (140_000_000.0, "")]
    part = history(found[1], found[:1])
    assert part and [grid.caption for grid in part.grids] == [
        "Perplexity",
        "Accuracy builtin, %",
        "Size, MB",
        "Decode, tok/s",
    ]
    assert part.grids[0].heads == ("Variant", "v1", "v2")
    assert ("gguf-q8_0", "25.62", "25.50") in part.grids[0].rows and part.notes == ()
    assert history(found[0], []) is None


@pytest.mark.parametrize(
    ("change", "title", "why"),
    [
        ({"perplexity": variant("perplexity") | {"protocol": {"length": 1024}}}, "Perplexity", "another"),
        ({"machine": {"cpu": "another"}}, "Decode", "another machine"),
        ({"device": "cuda"}, "Decode", "another device or runtime"),
        ({"speed": [variant("speed")[1]]}, "Decode", "another batch"),
        ({"speed": [variant("speed")[0] | {"dtype": "float16"}]}, "Decode", "another dtype"),
        ({"accuracy": [variant("accuracy")[0] | {"n": 60}]}, "Accuracy builtin", "another number of tasks"),
        ({"accuracy": [variant("accuracy")[0] | {"scorer": "lm-eval"}]}, "Accuracy builtin", "another scorer"),
        ({"accuracy": [variant("accuracy")[0] | {"acc_norm": None}]}, "Accuracy builtin", "another normalisation"),
        ({"source": {"model": "other", "identity": "x"}}, "Size", "another source model"),
    ],
)
def test_what_was_not_measured_alike_is_not_joined(change: dict[str, Any], title: str, why: str) -> None:
    found = versions({}, change)
    (_, first), (_, second) = line(found, title)
    assert first == "" and second.startswith(why)
    part = history(found[1], found[:1])
    assert part
    grid = next(grid for grid in part.grids if grid.caption.startswith(title))
    at = [row[0] for row in grid.rows].index("gguf-q8_0")
    assert grid.rows[at][2].startswith("‖ ")
    assert grid.sparks[at].count("<polyline") == 2, "two lines with a gap between"
    assert grid.sparks[0].count("<polyline") == (2 if set(change) <= {"machine", "source"} else 1)
    assert any(note.startswith(f"{title} in v2") and why in note for note in part.notes)


def test_results_from_before_the_protocol_had_a_name() -> None:
    named = variant("perplexity")
    named["protocol"] = {**named["protocol"], "name": "lighten"}
    assert line(versions({}, {"perplexity": named}), "Perplexity") == [(25.6161, ""), (25.6161, "")]


def test_a_gap_is_compared_with_the_last_that_was_measured() -> None:
    found = versions({}, {"perplexity": None}, {})
    assert line(found, "Perplexity") == [(25.6161, ""), (None, ""), (25.6161, "")]
    moved = variant("perplexity") | {"protocol": {"length": 1024}}
    assert line(versions({}, {"perplexity": None}, {"perplexity": moved}), "Perplexity")[2][1] != ""


def test_the_section_in_the_report() -> None:
    from lighten.report.render import html

    found = versions({}, {}, {"machine": {"cpu": "another"}})
    shown = Page(html(found[2], {}, "", found[:2]))
    points = [attributes for tag, attributes in shown.tags if tag == "g" and attributes.get("class") == "point"]
    assert any((point["aria-label"] or "").startswith("gguf-q8_0 in v3\nDecode, tok/s: 78.4\nNot") for point in points)
    assert "‖ 78.4" in shown.text
    text = markdown(found[2], found[:2])
    assert "### History" in text and "- Decode in v3: another machine." in text
    assert "### History" not in markdown(found[0])


def test_names_are_escaped() -> None:
    found = versions({}, {})
    for each in found:
        object.__setattr__(each.variants[3], "name", '"><script>')
    part = history(found[1], found[:1])
    assert part and "<script>" not in "".join(part.grids[0].sparks) + part_text(part)


def test_a_version_that_cannot_be_read_is_said(tmp_path: Any) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "results.json").write_text('{"schema": 9}')
    found, refused = read([tmp_path / "v1"])
    assert found == [] and "v1 is left out of the history" in refused[0] and "schema 9" in refused[0]
