"""Names of recipes, variants and versions, which must be safe as the name of a directory."""

from __future__ import annotations

import re

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
