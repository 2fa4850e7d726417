"""Links, and their substitutes on file systems without links."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES, errno.EINVAL)
_LONGEST = 4096
"""Maximum number of bytes of a path."""


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name. Copies it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def point(link: Path, target: str) -> None:
    """Makes `link` lead to `target`, a path relative to it, and replaces the old target.

    If the file system has no symbolic links, the link is a file with the path in it, which `follow` reads.
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
    """Returns the target of a link; the path itself if it is no link."""
    if link.is_file() and not link.is_symlink() and link.stat().st_size <= _LONGEST:
        with contextlib.suppress(OSError, ValueError):
            target = link.read_text(encoding="utf-8").strip()
            if target and "\n" not in target and "\0" not in target and (link.parent / target).is_dir():
                return (link.parent / target).resolve()
    return link.resolve()
