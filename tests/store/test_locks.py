"""Locks of the kernel: files of theirs may be removed, and what dies gives them up."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import RequestError
from lighten.store.locks import is_locked, locked, scratch_beside


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    assert not is_locked(file)
    with locked(file) as held, locked(file, wait=False) as again:
        assert held and not again
        assert is_locked(file)
    assert not is_locked(file)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    order: list[str] = []

    def second() -> None:
        with locked(file):
            order.append("second")
            with locked(file, wait=False) as again:
                order.append(f"alone: {not again}")

    with locked(file):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        file.unlink()
        order.append("first")
    thread.join(10)
    assert order == ["first", "second", "alone: True"]


def test_a_file_system_without_locks_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RequestError, match="no file locks"), locked(tmp_path / "a.lock"):
        pass
    with scratch_beside(tmp_path / "out") as folder:
        assert folder.is_dir()


def test_scratch_of_the_dead_is_removed_and_that_of_the_living_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".out-abcdefgh"
    dead.mkdir()
    (tmp_path / ".out-of-the-way").mkdir()
    with scratch_beside(tmp_path / "out") as one, scratch_beside(tmp_path / "out") as two:
        assert one.is_dir() and two.is_dir() and not dead.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out-of-the-way"]
