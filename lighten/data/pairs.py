"""Texts with their translations: the built-in phrases, or a file with a text and its translation in each record."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lighten.data import phrases
from lighten.data.documents import Row
from lighten.data.files import rows
from lighten.data.phrases import Pair, Split
from lighten.errors import RequestError, check_names

BUILTIN = "phrases"
"""Name of the built-in pairs: English phrases about numbers and dates, with their German translation."""
PREFIX = "pairs:"
"""What stands before the path of a file of pairs where a plain text could be meant too."""
MOST = {"train": 20_000, "test": 500}
"""Number of built-in pairs if none is asked for."""


def is_pairs(data: object) -> bool:
    """Returns whether `data` names pairs and not a text."""
    return isinstance(data, str) and (data == BUILTIN or data.startswith(PREFIX))


def load(data: str, split: Split, samples: int | None = None) -> list[Pair]:
    """Returns pairs of texts.

    Args:
        data: "phrases", or a file of records with the fields `source` and `target` (.jsonl, .json, .csv, .tsv or
            .parquet), with or without "pairs:" before its path.
        split: which of the built-in pairs.
        samples: number of pairs at most.

    Raises:
        RequestError: there is no such file, it has no pairs, or a record lacks one of the two texts.
        Failure: the file is damaged.
    """
    if data == BUILTIN:
        return phrases.some(split, samples or MOST[split])
    name = data.removeprefix(PREFIX)
    check_names([name])
    path = Path(name).expanduser()
    if not path.is_file():
        raise RequestError(
            f"there is no file {name}: pairs are {BUILTIN!r}, or a file of records with the fields source and target"
        )
    found = []
    for row in rows(path):
        found.append(_pair(row))
        if samples and len(found) == samples:
            break
    if not found:
        raise RequestError(f"{name} has no pairs of texts")
    return found


def _pair(row: Row) -> Pair:
    value = row.value
    texts = [value.get(name) for name in Pair._fields] if isinstance(value, dict) else []
    if len(texts) != 2 or not all(isinstance(each, str) and each.strip() for each in texts):
        raise RequestError(f"{row.place} is no pair: a record needs the texts `source` and `target`")
    return Pair(*map(str, texts))


def digest(pairs: list[Pair]) -> str:
    """Returns the SHA-256 of pairs: their identity in the keys of stages."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
