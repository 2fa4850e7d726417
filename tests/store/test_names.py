"""Names of rows and directories."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lighten.store.names import distinct, is_name

PARTS = st.text("ab-./ é", min_size=1, max_size=4).filter(lambda text: text.strip("./") != "")


def test_folders_tell_files_of_one_name_apart() -> None:
    paths = [Path("/x/ours/model.gguf"), Path("/x/theirs/model.gguf"), Path("/x/other.gguf")]
    assert distinct(paths) == ["ours-model.gguf", "theirs-model.gguf", "other.gguf"]


def test_a_taken_name_and_a_path_that_is_there_twice_get_a_number() -> None:
    twice = Path("/x/model")
    assert distinct([twice, twice]) == ["x-model", "x-model-2"]
    assert distinct([Path("/x/baseline")], ["baseline"]) == ["baseline-2"]


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3), max_size=6))
def test_every_path_gets_a_name_of_its_own(paths: list[list[str]]) -> None:
    names = distinct([Path("/", *each) for each in paths])
    assert len(names) == len(set(names)) == len(paths)
    assert all(is_name(name) for name in names)
