"""From a row of a data set to a document: the fields that hold text, and those that hold a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.errors import Failure, RequestError

Message = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Roles in a conversation, by the names that data sets give them."""
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("question", "answer"),
    ("question", "response"),
)
"""Pairs of fields: the question and its answer."""
MORE = ("input", "context")
"""Fields that continue the question."""


@dataclass(frozen=True)
class Turns:
    """A conversation. `pair` is true for one question with its answer, which also reads as a text."""

    messages: tuple[Message, ...]
    pair: bool = False


Document = str | Turns


@dataclass(frozen=True)
class Row:
    """A record and its place, such as `notes.jsonl:3`."""

    place: str
    value: Any


class _Unfit(ValueError):
    """The error that a field does not hold what its name promises."""


def documents(rows: Iterable[Row], field: str | None, source: str) -> Iterator[Document]:
    """Yields the document of every row. All rows are read like the first one.

    Raises:
        RequestError: the first row has no known field, or not the named one; the message lists its fields.
        Failure: a later row lacks the field, or has it in another form.
    """
    read: Callable[[Any], Document] | None = None
    for row in rows:
        if read is None:
            read = _reader(row.value, field, source)
        try:
            yield read(row.value)
        except (KeyError, TypeError) as error:
            missing = f'"{error.args[0]}"' if isinstance(error, KeyError) else "of the first row"
            raise Failure(f"{row.place}: expected an object with the field {missing}, as in the first row") from error
        except _Unfit as error:
            raise Failure(f"{row.place}: {error}") from error


def _reader(first: Any, field: str | None, source: str) -> Callable[[Any], Document]:
    if isinstance(first, str) and not field:
        return lambda value: _text(value, "each entry")
    if isinstance(first, list) and not field:
        return lambda value: _conversation(value, "each entry")
    if not isinstance(first, Mapping):
        raise RequestError(f"{source} holds no records with fields: give one JSON object for each text")
    if field:
        if field not in first:
            raise RequestError(f"{source} has no field {field!r}; its fields are {listed(first)}")
        return lambda value: _either(value[field], field)
    if "text" in first:
        return lambda value: _text(value["text"], "text")
    for name in ("messages", "conversations", "conversation"):
        if name in first:
            return lambda value: _conversation(value[name], name)
    for asked, answered in PAIRS:
        if asked in first and answered in first:
            return lambda value: _pair(value, asked, answered)
    if isinstance(first.get("chosen"), list):
        return lambda value: _conversation(value["chosen"], "chosen")
    raise RequestError(
        f"{source} has none of the fields text, messages, conversations, instruction and output, prompt and "
        f"completion, question and answer; its fields are {listed(first)}: name one of them (field: NAME in a recipe, "
        "--data path=FILE,field=NAME)"
    )


def listed(fields: Iterable[str]) -> str:
    """Returns the names of fields for a message: at most 20 of them, and at most 40 letters of each."""
    names = [str(name) if len(str(name)) <= 40 else f"{str(name)[:40]}…" for name in fields]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Unfit(f'the field "{name}" must be a string, not {type(value).__name__}')
    return value


def _either(value: Any, name: str) -> Document:
    return value if isinstance(value, str) else _conversation(value, name)


def _conversation(value: Any, name: str) -> Turns:
    """Returns turns from messages (role, content) or ShareGPT's (from, value)."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _Unfit(f'the field "{name}" must be a list of messages')
    return Turns(tuple(_message(each, name) for each in value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise _Unfit(f'the messages in "{name}" must be objects with role and content, or from and value')
    who, what = value.get("role", value.get("from")), value.get("content", value.get("value"))
    role = ROLES.get(str(who).lower())
    if role is None:
        raise _Unfit(f'"{name}" has a speaker {str(who)[:40]!r}; known are {", ".join(ROLES)}')
    others = {key: each for key, each in value.items() if key not in ("role", "content", "from", "value")}
    kept = {key: each for key, each in others.items() if each is not None}
    return {"role": role, "content": _content(what, name, optional="tool_calls" in kept), **kept}


def _content(value: Any, name: str, *, optional: bool = False) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), name) for part in value)
    if not isinstance(value, str):
        raise _Unfit(f'a message in "{name}" holds no text (images and sounds are not read)')
    return value


def _pair(value: Mapping[str, Any], asked: str, answered: str) -> Turns:
    if isinstance(value[answered], list):
        said = _conversation(value[answered], answered).messages
        whole = said[0]["role"] != "assistant"  # it begins with what was asked
        return Turns(said if whole else (*_opening(value[asked], asked), *said))
    question = [_text(value[asked], asked), *(_text(value[name], name) for name in MORE if value.get(name))]
    system = [{"role": "system", "content": _text(value["system"], "system")}] if value.get("system") else []
    answer = {"role": "assistant", "content": _text(value[answered], answered)}
    return Turns((*system, {"role": "user", "content": "\n\n".join(question)}, answer), pair=True)


def _opening(value: Any, name: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": value},) if isinstance(value, str) else _conversation(value, name).messages
