"""The YAML of a recipe: keys as they are written, no key twice, and the line of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lighten.data.reading import compose_yaml, construct_yaml
from lighten.errors import RequestError

Where = dict[tuple[str | int, ...], int]

_MERGE = "tag:yaml.org,2002:merge"
_STRING = "tag:yaml.org,2002:str"


def read(text: str, path: Path) -> tuple[Any, Where]:
    """Returns the value of a text, and the line of every key and item in it.

    A key is the string as it is written: a variant may be called on, 8 or 4.25 without quotes.

    Raises:
        RequestError: the text is no valid YAML, or a key stands twice in one mapping.
    """
    node = compose_yaml(text, str(path))
    _keys_as_written(node, path, set())
    return construct_yaml(node, str(path)), _lines(node)


def _keys_as_written(node: yaml.Node | None, path: Path, seen: set[int]) -> None:
    """Makes every key below a node a string, whatever type YAML gives it. Aliased nodes are visited once."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keys_as_written(item, path, seen)
        return
    first: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RequestError(f"{path}:{line}: a key must be a word, not a list or a mapping")
        if key.tag != _MERGE:
            key.tag = _STRING
            if key.value in first:
                raise RequestError(
                    f"{path}:{line}: the key {key.value!r} stands here and in line {first[key.value]}: YAML would "
                    "forget the first; rename or remove one of them"
                )
            first[key.value] = line
        _keys_as_written(child, path, seen)


def _lines(node: yaml.Node | None, at: tuple[str | int, ...] = ()) -> Where:
    """Returns the line of every key and item below a YAML node, by its path."""
    found: Where = {}
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            found[(*at, key.value)] = key.start_mark.line + 1
            found.update(_lines(child, (*at, key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            found[(*at, index)] = child.start_mark.line + 1
            found.update(_lines(child, (*at, index)))
    return found
