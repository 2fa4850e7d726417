"""Names of recipes, variants and versions, which must be safe as the name of a directory."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

LONGEST = 128
"""Maximum number of letters of a name. It becomes the name of a directory, with a suffix or two."""
PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(PATTERN)
_ELSEWHERE = re.compile(rf"({PATTERN}) @ [^/\\\x00-\x1f\x7f-\x9f]{{1,200}}")
"""Pattern of the name of a row that another machine measured: the variant's name, and the machine's."""


def is_name(text: str) -> bool:
    """Returns whether a text can be a name: letters, digits, ".", "_" and "-". The first is a letter or digit."""
    return len(text) <= LONGEST and NAME.fullmatch(text) is not None


def is_elsewhere(text: str) -> bool:
    """Returns whether a text is the name of a row of another machine, as `elsewhere` makes it."""
    return _ELSEWHERE.fullmatch(text) is not None


def elsewhere(name: str, machine: str) -> str:
    """Returns the name of a row that another machine measured."""
    plain = re.sub(r"[/\\\x00-\x1f\x7f-\x9f]+", "-", machine).strip()[:200]
    return f"{name} @ {plain or 'another machine'}"


def as_name(text: str) -> str:
    """Returns the nearest name to a text, for example for the name of a file."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:LONGEST]
    return found or "model"


def distinct(paths: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """Returns a name for each path: its last part, with the folders that tell apart those of one name.

    A path that is there twice, or whose name is taken, has a number at its end.
    """
    parts = [path.absolute().parts[1:] for path in paths]
    found = [as_name(each[-1]) if each else "model" for each in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        clashing = {name for name in found if found.count(name) > 1}
        found = [
            as_name("-".join(part[-depth:])) if name in clashing else name
            for name, part in zip(found, parts, strict=True)
        ]
    given = {*taken}
    for number, name in enumerate(found):
        tried = (name, *(f"{name}-{count}" for count in range(2, len(found) + len(given) + 2)))
        found[number] = next(each for each in tried if each not in given)
        given.add(found[number])
    return found
