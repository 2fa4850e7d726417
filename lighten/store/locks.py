"""Locks that the kernel releases when their holder ends, however it ends. No process number can be mistaken.

A lock is on a file (`flock`). `gc` may remove the file of a lock that nobody holds. So a holder checks that the file
that it locked still has its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lighten.errors import RequestError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file, which is made if it does not exist. Yields whether it was got (always with `wait`).

    Raises:
        RequestError: the file system has no locks.
    """
    descriptor = _open(file, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_locked(file: Path) -> bool:
    """Returns whether a process holds the lock of a file. It needs no permission to write."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not take(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, file)
    finally:
        os.close(descriptor)


def take(descriptor: int, operation: int, file: Path) -> bool:
    """Locks an open file. Returns whether the lock was got.

    Raises:
        RequestError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, operation)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise RequestError(
            f"the file system of {file.parent} has no file locks ({error.strerror}), and without them two runs would "
            "disturb each other: choose a directory on another one"
        ) from error


def _open(file: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        got = False
        try:
            got = take(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), file)
            if not got:
                return None
            if same(descriptor, file):
                return descriptor
            got = False  # removed while this waited: others lock the file that has the name now
        finally:
            if not got:
                os.close(descriptor)


def same(descriptor: int, file: Path) -> bool:
    """Returns whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target`, and removes those that killed processes left there."""
    with contextlib.suppress(RequestError):  # without locks nobody knows who lives, and nothing is removed
        for left in target.parent.glob(f".{glob.escape(target.name)}-????????"):
            if left.is_dir() and not is_locked(left):
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(RequestError):
                take(descriptor, fcntl.LOCK_EX, target)
            yield Path(folder)
        finally:
            os.close(descriptor)
