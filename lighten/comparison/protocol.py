"""Whether two were measured alike; if not, a comparison would compare the protocols."""

from __future__ import annotations

from typing import Any

from lighten.comparison.side import Side
from lighten.errors import RequestError

OWN = ("dtype", "tokenizer", "data")
"""What may differ: how the artifact itself is stored, whose tokenizer gave the same ids, what the text is called."""
WORDS = {
    "data_sha256": "text",
    "ids_sha256": "tokens of the text (another tokenizer)",
    "bos": "beginning-of-text token",
    "chunks": "number of chunks",
}


def check(a: Side, b: Side) -> None:
    """Does nothing if the two were measured alike.

    Raises:
        RequestError: they were not; names what differs.
    """
    found = [*_perplexity(a, b), *_tasks(a, b)]
    if found:
        raise RequestError(
            f"{a.text} and {b.text} were not measured alike and cannot be compared: {'; '.join(found)}. "
            "Measure both by one recipe, or compare their files, which measures both in the same way"
        )


def same_machine(a: Side, b: Side) -> bool:
    """Returns whether speeds of the two can be compared."""
    keys = ("cpu", "cores", "gpus")
    return a.row.device == b.row.device and all(a.machine.get(key) == b.machine.get(key) for key in keys)


def _perplexity(a: Side, b: Side) -> list[str]:
    if not (a.row.perplexity and b.row.perplexity):
        return []
    ours, theirs = a.row.perplexity.protocol, b.row.perplexity.protocol
    keys = [key for key in sorted({*ours, *theirs}) if key not in OWN and ours.get(key) != theirs.get(key)]
    if len(keys) > 1:  # other tokens follow from another text, length or number of chunks
        keys = [key for key in keys if key != "ids_sha256"]
    lines = [f"perplexity: {_differs(key, ours, theirs)}" for key in keys]
    both_torch = a.row.runtime == b.row.runtime == "torch"
    if both_torch and ours.get("dtype") != theirs.get("dtype"):
        lines.append(f"perplexity: arithmetic is {ours.get('dtype')} in A and {theirs.get('dtype')} in B")
    return lines


def _differs(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if key == "data_sha256" and ours.get("data") != theirs.get("data"):
        return f"text is {ours.get('data')} in A and {theirs.get('data')} in B"
    if key.endswith("sha256"):
        return f"another {WORDS.get(key, key)}"
    return f"{WORDS.get(key, key)} is {_short(ours.get(key))} in A and {_short(theirs.get(key))} in B"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _tasks(a: Side, b: Side) -> list[str]:
    ours, theirs = ({each.task: each for each in side.row.accuracy} for side in (a, b))
    if ours and theirs and not ours.keys() & theirs.keys():
        return [f"tasks are {', '.join(ours)} in A and {', '.join(theirs)} in B"]
    lines = []
    for task in [task for task in ours if task in theirs]:
        if ours[task].n != theirs[task].n:
            lines.append(f"{task} has {ours[task].n} tasks in A and {theirs[task].n} in B")
        elif task in a.accuracy and task in b.accuracy:
            digests = [side.accuracy[task].manifest["config"].get("data") for side in (a, b)]
            if digests[0] != digests[1]:
                lines.append(f"{task} holds not the same tasks")
    return lines
