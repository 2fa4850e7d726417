"""Multiple-choice sentence completion in HellaSwag's format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from lighten.data.documents import Row
from lighten.data.files import rows, value_of
from lighten.errors import Failure, RequestError, missing_extra


@dataclass(frozen=True)
class Choice:
    """One task: a context and endings. `label` is the position of the right ending.

    A model scores `context + " " + ending`; `acc_norm` divides by the ending's length in characters.
    """

    context: str
    endings: tuple[str, ...]
    label: int


def clean(text: str) -> str:
    """Returns HellaSwag text as lm-eval prepares it: without WikiHow's bracketed tags and double spaces."""
    text = text.strip().replace(" [title]", ". ")
    return "\n".join(map(_without_tags, text.split("\n"))).replace("  ", " ")


def _without_tags(line: str) -> str:
    tagged, closing, rest = line.rpartition("]")  # beyond it, each opening bracket would search to the end
    return re.sub(r"\[.*?\]", "", tagged + closing) + rest


def parse(line: dict[str, Any]) -> Choice:
    """Returns the task of one HellaSwag record, as lm-eval's `hellaswag` builds it.

    The context is "activity_label: ctx". If ctx_a and ctx_b are given, they (ctx_b capitalised) replace ctx.
    """
    if "ctx_a" in line and "ctx_b" in line:
        context = f"{line['ctx_a']} {str(line['ctx_b']).capitalize()}"
    else:
        context = str(line["ctx"])
    label = int(line["label"])
    given = line["endings"]
    if isinstance(given, str):  # a cell of a table
        given = value_of(given)
    endings = tuple(clean(str(ending)) for ending in given)
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} is not one of the {len(endings)} endings")
    return Choice(clean(f"{line['activity_label']}: {context}"), endings, label)


def _builtin() -> Iterator[Row]:
    folder = files("lighten.data") / "builtin" / "tasks"
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")), key=lambda e: e.name)
    lines = [[(entry.name, line) for line in entry.read_text(encoding="utf-8").splitlines()] for entry in entries]
    for turn in range(max(len(group) for group in lines)):
        for name, line in (group[turn] for group in lines if turn < len(group)):
            yield Row(name, json.loads(line))


def load_choices(data: str, limit: int | None = None) -> list[Choice]:
    """Returns the tasks that `data` names: "builtin", a file in HellaSwag's format, or "hellaswag".

    The built-in tasks are a smoke test and no benchmark: they are too few and too easy to rank models.

    Raises:
        RequestError: the file or data set does not exist, or is empty.
        Failure: a line that is not a task.
    """
    records: Iterator[Row]
    if data == "builtin":
        records = _builtin()
    elif data == "hellaswag":
        records = (Row(f"{data}, row {number}", row) for number, row in enumerate(_hub_hellaswag(), 1))
    else:
        records = rows(Path(data).expanduser())
    tasks = []
    for row in islice(records, limit):
        try:
            tasks.append(parse(row.value))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise Failure(
                f"{row.place}: not a HellaSwag record (ctx, activity_label, endings, label): {error}"
            ) from error
    if not tasks:
        raise RequestError(f"the tasks {data!r} are empty")
    return tasks


def _hub_hellaswag() -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra("eval", "datasets", "the hub data set 'hellaswag'") from error
    try:
        found: Iterable[dict[str, Any]] = load_dataset("Rowan/hellaswag", split="validation")
        return found
    except Exception as error:  # the library raises many kinds; all mean that the request cannot be served
        raise RequestError(f"cannot load HellaSwag from the hub: {error}. Give `local: FILE.jsonl` instead") from error


def digest(tasks: list[Choice]) -> str:
    """Returns the SHA-256 of a list of tasks."""
    return hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest()
