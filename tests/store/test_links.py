"""Links, and file systems that have none."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lighten.store.links import follow, link_or_copy, point


def refuse(*arguments: Any, **more: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_a_pointer_leads_somewhere_with_links_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "symlink", refuse)
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        point(tmp_path / "latest", name)
        assert follow(tmp_path / "latest") == (tmp_path / name).resolve()
    assert (tmp_path / "latest").is_symlink() == links
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "v1", "v2"]


def test_other_files_lead_nowhere(tmp_path: Path) -> None:
    for content in (b"", b"nothing", b"\xff\xfe", b"a\nb", b"x" * 5000):
        (tmp_path / "file").write_bytes(content)
        assert follow(tmp_path / "file") == (tmp_path / "file").resolve()


def test_a_second_name_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_bytes(b"weights")
    link_or_copy(tmp_path / "one", tmp_path / "two")
    assert os.path.samefile(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == b"weights"
    with pytest.raises(FileNotFoundError):
        monkeypatch.undo()
        link_or_copy(tmp_path / "none", tmp_path / "four")
