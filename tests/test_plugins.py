"""Rows of ours and of installed packages."""

import sys
from pathlib import Path

import pytest

from lighten.errors import Failure, RequestError
from lighten.plugins import Table


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it: a module, and what it declares."""
    (tmp_path / "their_things.py").write_text("class Theirs:\n    pass\n")
    declared = tmp_path / "theirs-1.0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text(
        "[lighten.things]\ntheirs = their_things:Theirs\npath = their_things:Theirs\ngone = their_things:Gone\n"
        "broken = no_such_module:Theirs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_things", raising=False)
    return tmp_path


def table() -> Table:
    return Table("thing", "lighten.things", {"path": "pathlib:Path"})


def test_an_installed_package_adds_rows(installed: Path) -> None:
    found = table()
    assert found.names == ["path", "theirs", "gone", "broken"]
    assert "their_things" not in sys.modules, "nothing is imported before it is asked for"
    assert found.load("theirs").__name__ == "Theirs"


def test_a_name_of_ours_stays_ours(installed: Path) -> None:
    assert table().load("path") is Path


@pytest.mark.parametrize(("name", "why"), [("gone", "AttributeError"), ("broken", "ModuleNotFoundError")])
def test_a_package_that_cannot_be_imported_is_named(installed: Path, name: str, why: str) -> None:
    with pytest.raises(Failure, match=f"thing {name} comes from an installed package.*{why}"):
        table().load(name)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="there is no thing 'other'; there is path"):
        table().load("other")
