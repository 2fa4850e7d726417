"""The files of a model directory, which another person made: no link leads out of it, and every file is only data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
"""Suffixes of files that can run code when they are opened."""
LARGEST_JSON = 1 << 28
"""Maximum number of bytes of a JSON file. The largest tokenizers have 35 MB."""
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_links(folder: Path) -> None:
    """Checks that no file in a directory is a link to another place.

    The cache of the hub, whose snapshots link to the blobs of the same repository, counts as one directory.

    Raises:
        RequestError: a link leads out. Its maker chose a file of this machine, to be read, copied and published.
    """
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and entry.is_file():
            inside(entry, folder)


def inside(file: Path, folder: Path) -> Path:
    """Returns a file that lies in a directory, after following its links.

    Raises:
        RequestError: a link leads out of the directory.
    """
    root, there = folder.resolve(), file.resolve()
    around = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    allowed = [root] if around is None else [root, around / "blobs"]
    if not any(there.is_relative_to(each) for each in allowed):
        name = file.relative_to(folder) if file.is_relative_to(folder) else file
        raise RequestError(
            f"{folder}: {name} leads out of the directory, to {there}, so it is not read: "
            "if you want that file there, put a copy in the place of the link"
        )
    return file


def plain(name: Any, folder: Path, teller: str) -> Path:
    """Returns the path of a file in a directory that another file names.

    Raises:
        RequestError: it names no file of that directory.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise RequestError(
            f"{folder / teller} names the file {str(name)[:100]!r}: only files beside it are read, by their plain names"
        )
    return inside(folder / name, folder)


def without_pickles(folder: Path) -> Iterator[Path]:
    """Yields the files of a directory, sorted, without pickles.

    Raises:
        RequestError: a link leads out of the directory.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in PICKLES):
            yield inside(file, folder)


def refuse_pointer(file: Path) -> None:
    """Raises RequestError if Git left a pointer in place of a file."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise RequestError(
                f"{file} is a Git LFS pointer, a few lines in place of the file: run `git lfs pull` in {file.parent}"
            )


def read_json(path: Path, advice: str = "fetch or save it again") -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        RequestError: the file is a pointer of Git.
        Failure: it is not readable, not UTF-8, too large, nested too deep, no object, or has a key twice.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise Failure(f"{path} has {size:,} bytes, and no such file of a model has as many: {advice}")
        refuse_pointer(path)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} is damaged (not readable JSON: {error}): {advice}") from error
    except RecursionError as error:
        raise Failure(f"{path} is nested too deep to be what it should be: {advice}") from error
    if not isinstance(value, dict):
        raise Failure(f"{path} must hold a JSON object, and holds {type(value).__name__}: {advice}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found
