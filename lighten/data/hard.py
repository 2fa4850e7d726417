"""Strings that are hard for tokenizers."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import files


@cache
def pieces() -> tuple[str, ...]:
    """Returns strings in many scripts, code, numbers, white space, emoji and control characters."""
    file = files("lighten.data") / "builtin" / "hard.json"
    return tuple(json.loads(file.read_text(encoding="utf-8")))


def hard_strings(count: int = 500, special: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """Returns the pieces, and seeded mixtures of them.

    Args:
        count: number of strings.
        special: names of special tokens, which appear among the pieces: at most a quarter of the strings.
        seed: seed of the mixtures.
    """
    dice = random.Random(seed)
    named = special[: count // 4]  # some models have thousands
    known = [*pieces(), *named[: len(pieces())]]
    found = list(dict.fromkeys([*named, *pieces()]))[:count]
    while len(found) < count:
        parts = [dice.choice(known) for _ in range(dice.randint(2, 6))]
        found.append(dice.choice(("", " ", " ", "\n")).join(parts))
    return found
