"""Links, and what stands for them on file systems that have none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES, errno.EINVAL)
_LONGEST = 4096
"""Bytes of a path."""


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def point(link: Path, target: str) -> None:
    """Lets `link` lead to `target`, a path relative to it; replaces what it led to before.

    Where the file system has no symbolic links it is a file with the path in it, which `follow` reads.
    """
    scratch = link.with_name(f".{link.name}")
    with contextlib.suppress(FileNotFoundError):
        scratch.unlink()
    try:
        scratch.symlink_to(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        scratch.write_text(target + "\n", encoding="utf-8")
    os.replace(scratch, link)


def follow(link: Path) -> Path:
    """Returns what a link leads to, or the path itself if it is none."""
    if link.is_file() and not link.is_symlink() and link.stat().st_size <= _LONGEST:
        with contextlib.suppress(OSError, ValueError):
            told = link.read_text(encoding="utf-8").strip()
            if told and "\n" not in told and "\0" not in told and (link.parent / told).is_dir():
                return (link.parent / told).resolve()
    return link.resolve()
