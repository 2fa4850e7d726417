from pathlib import Path

import pytest
import yaml

from lighten.report.shareable import shareable, without_paths
from lighten.results.results import Results

from .sample import raw


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/me/models/secret/m.gguf", "m.gguf"),
        ("~/models/m", "m"),
        ("../data/a b.txt", "a b.txt"),
        ("C:\\Users\\me\\x.txt", "x.txt"),
        ("cannot read /home/me/a/b.txt: no such file", "cannot read b.txt: no such file"),
        ("org/model", "org/model"),
        ("https://github.com/org/model", "https://github.com/org/model"),
        ("12 tok/s, W/kg and/or <b>x</b>", "12 tok/s, W/kg and/or <b>x</b>"),
        ("demo:smollm2-135m", "demo:smollm2-135m"),
    ],
)
def test_paths_become_names(text: str, told: str) -> None:
    assert without_paths({"a": [text]}) == {"a": [told]}


def test_results_for_others_tell_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/texts.txt").write_text("x")
    told = raw()
    told["recipe_yaml"] = yaml.safe_dump(
        {"name": "r", "model": "/home/me/m", "calibration": {"data": "mine/texts.txt"}, "evaluate": {"x": "org/data"}}
    )
    told["source"]["model"] = "/home/me/m"
    told["warnings"] = ["mine/texts.txt is short", "see /home/me/log/x.txt"]
    told["variants"][1]["perplexity"]["protocol"]["data"] = "mine/texts.txt"
    made = shareable(Results.model_validate(told))
    text = made.model_dump_json()
    assert "/home/me" not in text and "mine/" not in text and "org/data" in text
    assert made.variants[1].key == told["variants"][1]["key"]
    assert made.warnings == ["texts.txt is short", "see x.txt"]
    assert yaml.safe_load(made.recipe_yaml)["calibration"] == {"data": "texts.txt"}
