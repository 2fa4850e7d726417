"""Text to calibrate, train and measure on: the built-in sets, a file, or a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from lighten.data import files as files_
from lighten.data import pairs
from lighten.data.documents import Document, Message, Row, Turns, documents
from lighten.data.origin import Origin, is_file, parts, text_name
from lighten.errors import RequestError, check_names, missing_extra

SEPARATOR = "\n---\n"
Part = Literal["calibration", "perplexity"]
LETTERS = 8
"""Number of letters for a token, on the safe side."""
Render = Callable[[Sequence[Message]], str]
"""Function that writes the turns of a conversation as one text."""


def builtin_text(part: Part) -> str:
    """Returns the built-in text of one part, its documents separated by blank lines.

    It is a smoke test and no benchmark: about 70 kB in six registers (encyclopaedic, narrative, dialogue, instructions,
    code, tables). The two parts share no document.
    """
    return "\n\n".join(_builtin_documents(part)) + "\n"


def _builtin_documents(part: Part) -> list[str]:
    folder = files("lighten.data") / "builtin" / part
    # registers take turns, so that a short prefix of the text already holds all of them
    registers = [
        [document.strip() for document in entry.read_text(encoding="utf-8").split(SEPARATOR)]
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".txt")
    ]
    longest = max(len(documents) for documents in registers)
    return [documents[turn] for turn in range(longest) for documents in registers if turn < len(documents)]


def read(data: str | Origin, part: Part, letters: int | None = None) -> list[Document]:
    """Returns the documents that `data` names: texts, and conversations in turns.

    They are those of the built-in text, the records of a file, or the rows of a hub data set; a file of plain text is
    one document.

    Args:
        data: "builtin", the path of a file, or a hub data set as "id", "id:config" or "id:config:split"; or the same
            with the field to read.
        part: which built-in text "builtin" means, and the default split of a hub data set
            (train for calibration, test for perplexity).
        letters: how many of a large file are wanted at least; None for all of them.

    Raises:
        RequestError: no such file, a file without a field that is known, or a data set that cannot be loaded.
        Failure: a file that is damaged.
    """
    (origin,) = parts(data)
    if pairs.is_pairs(origin.id):
        each = pairs.load(str(origin.id), "train" if part == "calibration" else "test")
        return ["\n".join(pair) for pair in each]
    if origin.id == "builtin":
        return list(_builtin_documents(part))
    if origin.path is not None or (origin.id and is_file(origin.id)):
        name = str(origin.path or origin.id)
        check_names([name])
        return list(files_.read(Path(name).expanduser(), origin.field, letters))
    return list(documents(_read_hub(origin, part), origin.field, origin.name))


def load_documents(data: str | Origin, part: Part, render: Render | None = None) -> list[str]:
    """Returns the documents of a text, without empty ones. Arguments and errors are those of `load_text`."""
    found = [each for each in _texts(read(data, part), render, text_name(data)) if each.strip()]
    if not found:
        raise RequestError(f"the text {text_name(data)!r} is empty")
    return found


def load_text(data: str | Origin, part: Part, render: Render | None = None, letters: int | None = None) -> str:
    """Returns the text that `data` names: its documents with a blank line between them.

    Args:
        data: as for `read`.
        part: as for `read`.
        render: writes turns as the model's chat template has it; conversations then follow each other directly. None
            for a model without: a question with its answer is two paragraphs then.
        letters: as for `read`.

    Raises:
        RequestError: as `read`, or conversations where there is no template.
        Failure: as `read`.
    """
    if data == "builtin":
        return builtin_text(part)
    found = read(data, part, letters)
    turned = render is not None and any(isinstance(each, Turns) for each in found)
    return ("" if turned else "\n\n").join(_texts(found, render, text_name(data)))


def _texts(found: list[Document], render: Render | None, name: str) -> Iterator[str]:
    for each in found:
        if isinstance(each, str):
            yield each
        elif render:
            yield render(each.messages)
        elif each.pair:
            yield "\n\n".join(str(message["content"]) for message in each.messages)
        else:
            raise RequestError(
                f"{name} holds conversations, and the model has no chat template to write them by: put its template "
                "beside it (chat_template.jinja), or name a field of plain text"
            )


def identity(data: str | Origin | Sequence[Origin], part: Part, letters: int | None = None) -> str:
    """Returns the SHA-256 of a text, whatever its name and place. Raises the errors of `read`.

    Conversations count by their turns: the template that writes them belongs to the model.
    """
    if not isinstance(data, str | Origin):
        return digest(json.dumps([[identity(each, part, letters), each.share] for each in data]))
    if data == "builtin":
        return digest(builtin_text(part))
    found = read(data, part, letters)
    plain = [each for each in found if isinstance(each, str)]
    if len(plain) == len(found):
        return digest("\n\n".join(plain))
    spelled = [each if isinstance(each, str) else [each.messages, each.pair] for each in found]
    return digest("turns 1\0" + json.dumps(spelled, sort_keys=True, default=str))


def wanted_letters(samples: int | None, length: int) -> int | None:
    """Returns the letters that so many sequences of `length` tokens need; None if they take the whole text."""
    return LETTERS * samples * length if samples else None


def count_letters(data: str | Origin | Sequence[Origin], part: Part, letters: int | None = None) -> int:
    """Returns about how many letters a text has; of a mixture, as many as its scarcest part allows."""
    return int(min(sum(map(letters_of, read(each, part, letters))) / (each.share or 1) for each in parts(data)))


def letters_of(document: Document) -> int:
    """Returns the letters of a document."""
    if isinstance(document, str):
        return len(document)
    return sum(len(str(message["content"])) for message in document.messages)


def _read_hub(origin: Origin, part: Part) -> Iterator[Row]:
    name, _, rest = str(origin.id).partition(":")
    config, _, split = rest.partition(":")
    config, split = origin.config or config, origin.split or split or ("train" if part == "calibration" else "test")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra("eval", "datasets", f"the hub data set {origin.name!r} (no file is called so)") from error
    try:
        rows = load_dataset(name, config or None, split=split)
        if "text" in rows.column_names and not origin.field:
            rows = rows.select_columns(["text"])  # other columns are not decoded
    except Exception as error:  # the library raises many kinds; all mean that the request cannot be served
        raise RequestError(
            f"cannot load the hub data set {origin.name!r}: {error}. Give a file (.txt, .jsonl, .json, .csv, "
            ".parquet), or 'builtin'"
        ) from error
    return (Row(f"{origin.name}, row {number}", row) for number, row in enumerate(rows, 1))


def digest(text: str) -> str:
    """Returns the SHA-256 of a text: its identity in stage keys and protocols."""
    return hashlib.sha256(text.encode()).hexdigest()
