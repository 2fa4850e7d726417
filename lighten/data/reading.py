"""JSON and YAML from other people, read within limits of size, depth and expanded aliases."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import yaml

from lighten.errors import RequestError

LONGEST = 64_000_000
"""Maximum number of bytes of a JSON text."""
LONGEST_YAML = 1_000_000
DEEPEST = 40
MOST = 100_000
"""Maximum number of nodes of a YAML document with expanded aliases."""


class Refused(ValueError):
    """The error of a text that exceeds a limit, or is not what it claims to be."""


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        Refused: the text is no JSON, contains NaN or infinity, or is too long or too deep.
    """
    if len(text) > LONGEST:
        raise Refused(f"it has {len(text):,} bytes, more than {LONGEST:,}")
    try:
        value = json.loads(text, parse_constant=_no_number)
        check_depth(value)
    except RecursionError as error:
        raise Refused("it is nested too deeply") from error
    except Refused:
        raise
    except ValueError as error:  # a UnicodeDecodeError and a number of too many digits are ValueErrors too
        raise Refused(str(error)) from error
    return value


def _no_number(text: str) -> NoReturn:
    raise Refused(f"{text} is no number of JSON's")


def check_depth(value: Any) -> None:
    """Raises Refused if lists and objects are nested more than `DEEPEST` levels deep."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise Refused(f"it is nested more than {DEEPEST} levels deep")


def compose_yaml(text: str, name: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> yaml.Node | None:
    """Returns the nodes of a YAML document. `name` is its name in messages.

    Raises:
        RequestError: the text is no YAML (the message has the line), or exceeds a limit.
    """
    if len(text) > LONGEST_YAML:
        raise RequestError(f"{name}: cannot be read: it has {len(text):,} letters, more than {LONGEST_YAML:,}")
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RequestError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{name}: cannot be read: {error}") from error
    except RecursionError as error:
        raise RequestError(f"{name}:1: cannot be read: it is nested too deeply") from error
    if node is not None:
        _count(node, name, {}, ())
    return node


def _count(node: yaml.Node, name: str, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Returns the number of nodes of a document in which every alias is replaced by its meaning."""
    line = node.start_mark.line + 1
    if id(node) in above:
        raise RequestError(f"{name}:{line}: cannot be read: an alias stands inside the value that it refers to")
    if len(above) >= DEEPEST:
        raise RequestError(f"{name}:{line}: cannot be read: it is nested more than {DEEPEST} levels deep")
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count(each, name, known, (*above, id(node))) for each in inner)
        if known[id(node)] > MOST:
            raise RequestError(f"{name}:{line}: cannot be read: its aliases expand to more than {MOST:,} values")
    return known[id(node)]


def construct_yaml(node: yaml.Node | None, name: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Returns the value of the nodes that `compose_yaml` returned.

    Raises:
        RequestError: an unknown tag, an impossible key, or a date or number that is none.
    """
    if node is None:
        return None
    maker = loader("")
    try:
        return maker.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RequestError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # 2001-99-99, or a number of a million digits
        raise RequestError(f"{name}: cannot be read: {error}") from error
    finally:
        maker.dispose()


def parse_yaml(text: str, name: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Returns the value of a YAML document. `name` is its name in messages.

    Raises:
        RequestError: as `compose_yaml` and `construct_yaml`.
    """
    return construct_yaml(compose_yaml(text, name, loader), name, loader)
