from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from lighten.compress.calibrate.sweep import Sweep
from lighten.data.origin import Data, Origin, text_name
from lighten.data.text import builtin_text, digest

ADAPTER: TypeAdapter[Any] = TypeAdapter(Data)


def test_a_name_stays_a_text_and_its_key_what_it_was() -> None:
    assert ADAPTER.validate_python("org/set:en:train") == "org/set:en:train"
    assert ADAPTER.validate_python(["a.txt"]) == "a.txt"
    sweep = Sweep.model_validate({})
    assert sweep.key_config() == {"data": digest(builtin_text("calibration")), "samples": 64, "length": 512}
    assert sweep.model_dump(mode="json")["data"] == "builtin"


def test_shares_are_given_or_what_is_left() -> None:
    found = ADAPTER.validate_python([{"id": "builtin", "share": 0.5}, "a.jsonl", "path=b.csv,field=body"])
    assert [(each.id, each.path, each.field, each.share) for each in found] == [
        ("builtin", None, None, 0.5),
        (None, "a.jsonl", None, 0.25),
        (None, "b.csv", "body", 0.25),
    ]
    assert text_name(found) == "50% builtin, 25% a.jsonl, 25% b.csv (body)"
    assert ADAPTER.validate_python(ADAPTER.dump_python(found, mode="json")) == found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"id": "a/b", "share": 0.5}, {"id": "c/d", "share": 0.4}], "add up to 0.9, not to 1"),
        ([{"id": "a/b", "share": 1.0}, "c/d"], "leave nothing for c/d"),
        ({"id": "a/b", "path": "c"}, "one of the two"),
        ({"path": "c.txt", "split": "train"}, "belong to a hub data set"),
        ([], "names nothing"),
        ([3], "a name, or a mapping"),
        ([{"path": "a"}, 3], "a name, or a mapping"),
        ({"path": "a", "shares": 1}, "data.shares: .*known are path, id"),
        ({"path": "a", "share": 2}, "data.share: "),
    ],
)
def test_wrong_mixtures(given: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ADAPTER.validate_python(given)


def test_names_of_hub_sets_and_files(tmp_path: Path) -> None:
    assert Origin(id="org/set", split="test").name == "org/set::test"
    assert Origin(id="org/set", config="en", field="body").name == "org/set:en (body)"
