"""Writing, flushing and removing files. A kill, a full disk or a second run never finds anything half-done."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

UNFINISHED = r"\..+\.[a-z0-9_]{8}"
"""Pattern of the temporary names that `write_file` uses."""


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_file` does."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it. Readers see the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        flush(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def flush(path: Path) -> None:
    """Makes sure that a file, or the names in a directory, are on the disk, as far as its file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS):
            raise  # some network file systems flush no directories
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Removes a directory tree, read-only entries included. It is no error if another process removes parts of it."""

    def allow(function: Any, name: str, _error: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(os.path.dirname(name), 0o755)
            os.chmod(name, 0o755)
            function(name)

    shutil.rmtree(path, onerror=allow)


def freeze(path: Path) -> None:
    """Flushes a tree to disk and removes its write permissions."""
    for entry in [*path.rglob("*"), path]:
        flush(entry)
        os.chmod(entry, stat.S_IMODE(entry.stat().st_mode) & ~0o222)


MANIFEST = "artifact.json"


def canonical(value: Any) -> str:
    """Returns `value` as JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def stage_key(kind: str, version: int, config: dict[str, Any], parents: Iterable[str]) -> str:
    """Returns the SHA-256 (64 hex digits) of a step's kind, version, settings and its parents' keys."""
    identity = {"kind": kind, "version": version, "config": config, "parents": list(parents)}
    return hashlib.sha256(canonical(identity).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path) -> list[dict[str, Any]]:
    """Returns path, size and SHA-256 of every file under `root` except its manifest, sorted by path."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = list(pool.map(hash_file, paths))
    return [
        {"path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    ]
