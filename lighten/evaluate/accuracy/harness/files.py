"""The parts of an lm-eval task file, found by reading. lm-eval itself would run the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lighten.data.reading import parse_yaml
from lighten.errors import RequestError

MOST = 1000
"""Maximum number of files of a task."""
LETTERS = 400
"""Characters of a document, if they cannot be counted."""
DOCUMENTS = 1000
"""Documents of a data set that is not on this machine."""
DRAWN = b"a generator for each request"
"""How answers are drawn at random. Part of the digest of tasks that do so: results of another way are not theirs."""
_TEMPERATURE = re.compile(rb"temperature[\"']?\s*:\s*([0-9.]+)")
_GREEDY = re.compile(rb"do_sample[\"']?\s*:\s*(false|no|off)\b", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's tags as the text behind them."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value) if suffix else None)


def parts(file: Path) -> dict[str, Path]:
    """Returns the files of a task, by their path beside the task file.

    These are the files that it includes, the modules beside it if it names a function, the other task files of its
    directory if it is a group, and local data.

    Raises:
        RequestError: the file does not exist, is no YAML, or has too many parts.
    """
    top = file.resolve().parent
    found: dict[str, Path] = {}
    waiting = [file.resolve()]
    while waiting:
        each = waiting.pop()
        name = each.relative_to(top).as_posix() if each.is_relative_to(top) else each.name
        if name in found:
            continue
        found[name] = each
        if len(found) > MOST:
            raise RequestError(f"the task file {file} is made of more than {MOST:,} files: put it in its own directory")
        if each.suffix in (".yaml", ".yml"):
            waiting += _named(each)
    return dict(sorted(found.items()))


def _named(file: Path) -> Iterator[Path]:
    """Yields the files that a task file names and that exist."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the task file {file}: {error}") from error
    value = parse_yaml(text, str(file), _Loader)
    if not isinstance(value, dict):
        raise RequestError(f"{file} is no task of lm-eval's: a task file is a mapping with `task`")
    included = value.get("include")
    for name in included if isinstance(included, list) else [included]:
        if isinstance(name, str) and (there := file.parent / name).is_file():
            yield there.resolve()
    if "!function" in text:
        yield from (path.resolve() for path in sorted(file.parent.glob("*.py")))
    if "group" in value or isinstance(value.get("task"), list):
        yield from (path.resolve() for path in sorted(file.parent.glob("*.y*ml")))
    yield from _data(file, value)


def _data(file: Path, value: dict[str, Any]) -> Iterator[Path]:
    settings = value.get("dataset_kwargs")
    waiting = [settings.get("data_files")] if isinstance(settings, dict) else []
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            waiting += each.values() if isinstance(each, dict) else each
        elif isinstance(each, str) and (there := file.parent / each).is_file():
            yield there.resolve()


def _draws(content: bytes) -> bool:
    """Returns whether a file seems to ask for answers that are drawn at random."""
    warm = any(each.strip(b"0.") for each in _TEMPERATURE.findall(content))
    return warm and not _GREEDY.search(content)


def facts(file: Path, local: Path | None, limit: int | None) -> dict[str, Any]:
    """Returns the facts of a task file, with rough numbers of documents and letters.

    Args:
        file: the task file.
        local: data instead of the task's own.
        limit: maximum number of documents.

    Raises:
        RequestError: as `parts`.
    """
    made = parts(file) | ({"local": local} if local and local.is_file() else {})
    digest = hashlib.sha256()
    documents = letters = 0
    writes = False
    for name, path in made.items():
        content = path.read_bytes()
        digest.update(json.dumps([name, hashlib.sha256(content).hexdigest()]).encode())
        if path.suffix not in (".py", ".yaml", ".yml"):
            documents += max(1, content.count(b"\n"))
            letters += len(content)
        else:
            writes = writes or b"generate_until" in content
            digest.update(DRAWN if _draws(content) else b"")
    documents, letters = documents or DOCUMENTS, letters or DOCUMENTS * LETTERS
    asked = min(limit or documents, documents)
    return {
        "task": file.stem,
        "documents": asked,
        "letters": letters * asked // documents,
        "digest": digest.hexdigest(),
        "version": version("lm_eval"),
        "writes": writes,
    }
