"""Plain text: the built-in sets, a `.txt` or `.jsonl` file, or a hub data set."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

from lighten.errors import Failure, RequestError, missing_extra

SEPARATOR = "\n---\n"
Part = Literal["calibration", "perplexity"]


def builtin_text(part: Part) -> str:
    """Returns the built-in text of one part, its documents separated by blank lines.

    A smoke test, not a benchmark: about 70 kB in six registers (encyclopaedic, narrative, dialogue,
    instructions, code, tables). The two parts share no document.
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


def load_documents(data: str, part: Part) -> list[str]:
    """Returns the documents of the text that `data` names, without empty ones.

    They are those of the built-in text, the lines of a `.jsonl` file, and the rows of a hub data set; a `.txt` file is
    one document. Arguments and errors are those of `load_text`.
    """
    if data == "builtin":
        found = _builtin_documents(part)
    elif _is_file(path := Path(data).expanduser()):
        text = _read(path)
        found = read_lines(path, text, "text") if path.suffix == ".jsonl" else [text]
    else:
        found = _read_hub(data, part)
    if not (documents := [each for each in found if each.strip()]):
        raise RequestError(f"the text {data!r} is empty")
    return documents


def load_text(data: str, part: Part) -> str:
    """Returns the text that `data` names.

    Args:
        data: "builtin", the path of a `.txt` file (taken as it is) or of a `.jsonl` file (field "text" of every
            line, joined by blank lines), or a hub data set as "id", "id:config" or "id:config:split".
        part: which built-in text "builtin" means, and the default split of a hub data set
            (train for calibration, test for perplexity).

    Raises:
        RequestError: no such file, or a data set that cannot be loaded.
        Failure: a file that is not UTF-8 text or not JSON lines.
    """
    if data == "builtin":
        return builtin_text(part)
    path = Path(data).expanduser()
    if not _is_file(path):
        return "\n\n".join(_read_hub(data, part))
    text = _read(path)
    return "\n\n".join(read_lines(path, text, "text")) if path.suffix == ".jsonl" else text


def _is_file(path: Path) -> bool:
    return path.suffix in (".txt", ".jsonl") or path.is_file()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise RequestError(f"cannot read the text {path}: {error.strerror}; check the path") from error


def read_lines(path: Path, text: str, field: str) -> list[str]:
    """Returns the string `field` of every JSON line."""
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise Failure(f'{path}:{number}: expected a JSON object with the field "{field}" ({error})') from error
        if not isinstance(value, str):
            raise Failure(f'{path}:{number}: the field "{field}" must be a string')
        values.append(value)
    return values


def _read_hub(data: str, part: Part) -> list[str]:
    name, _, rest = data.partition(":")
    config, _, split = rest.partition(":")
    split = split or ("train" if part == "calibration" else "test")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra("eval", "datasets", f"the hub data set {data!r} (not a .txt or .jsonl file)") from error
    try:
        rows = load_dataset(name, config or None, split=split)
        return list(rows["text"])
    except Exception as error:  # the library raises many kinds; all mean that the request cannot be served
        raise RequestError(
            f"cannot load the hub data set {data!r}: {error}. Give a .txt or .jsonl file, or 'builtin'"
        ) from error


def digest(text: str) -> str:
    """Returns the SHA-256 of a text: its identity in stage keys and protocols."""
    return hashlib.sha256(text.encode()).hexdigest()
