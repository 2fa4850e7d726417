"""What is published: names and hashes take the place of paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lighten.errors import LightenError
from lighten.report.asked import asked
from lighten.results.results import Results

_PATH = re.compile(r"(?<![\w:/.<])(?:~[\w.-]*|\.{1,2})?/(?:[\w.+@=-]+/)+[\w.+@=-]+")
"""Path inside a sentence: at least two names, and not part of an address or a closing tag."""
_WHOLE = re.compile(r"(?:~[\w.-]*|\.{1,2})?/.+|[A-Za-z]:[\\/].+|~")
"""Text that is a path."""


def without_paths(value: Any, known: Mapping[str, str] | None = None) -> Any:
    """Returns JSON's values in which the last name of every path of this machine takes the place of the path.

    Args:
        value: what is published.
        known: further paths and their names, such as relative paths in a recipe.
    """
    if isinstance(value, str):
        return _named(value, known or {})
    if isinstance(value, dict):
        return {_named(str(key), known or {}): without_paths(each, known) for key, each in value.items()}
    return [without_paths(each, known) for each in value] if isinstance(value, list) else value


def _named(text: str, known: Mapping[str, str]) -> str:
    if _WHOLE.fullmatch(text):
        return PurePosixPath(text.replace("\\", "/")).name
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path])
    return _PATH.sub(lambda found: PurePosixPath(found[0]).name, text)


def local_paths(results: Results) -> dict[str, str]:
    """Returns the paths that a recipe names and that lie on this machine, with the last name of each."""
    try:
        recipe = asked(results)
    except LightenError:
        recipe = {}
    named = [results.source.model, *_texts(recipe)]
    return {text: name for text in named if _is_local(text) and (name := Path(text).name)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _is_local(text: str) -> bool:
    if _WHOLE.fullmatch(text):
        return True
    try:
        return "/" in text and len(text) < 1000 and Path(text).exists()
    except (OSError, ValueError):
        return False


def shareable(results: Results) -> Results:
    """Returns results without paths of this machine. The names and hashes of models and texts stay."""
    known = local_paths(results)
    values = without_paths(results.model_dump(mode="json", by_alias=True), known)
    try:
        recipe = asked(results)
    except LightenError:
        recipe = {}
    if recipe:
        values["recipe_yaml"] = yaml.safe_dump(without_paths(recipe, known), sort_keys=False, allow_unicode=True)
    return Results.model_validate(values)
