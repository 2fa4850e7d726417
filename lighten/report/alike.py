"""Whether two measurements were made alike. Numbers that were not made alike are never compared."""

from __future__ import annotations

from lighten.results.measured import Accuracy, Free, Perplexity, Speed

OWN = ("dtype", "tokenizer", "data")
"""Settings of a protocol that may differ: how the artifact is stored, whose tokenizer gave the same ids, and the name
of the text."""
WORDS = {
    "data_sha256": "text",
    "ids_sha256": "tokens of the text (another tokenizer)",
    "bos": "beginning-of-text token",
    "chunks": "number of chunks",
}
MACHINE = ("cpu", "cores", "gpus")
"""Facts that make a machine another machine."""
SETTING = ("batch", "prompt", "generate", "dtype", "attention", "compile", "cache", "draft")
"""Settings that make a speed another measurement."""


def differing(ours: Free, theirs: Free) -> list[str]:
    """Returns the settings in which two protocols of perplexity differ, except those that may differ."""
    keys = [key for key in sorted({*ours, *theirs}) if key not in OWN and ours.get(key) != theirs.get(key)]
    if len(keys) > 1:  # other tokens follow from another text, length or number of chunks
        keys = [key for key in keys if key != "ids_sha256"]
    return keys


def same_machine(ours: Free, theirs: Free) -> bool:
    """Returns whether speeds of two machines can be compared."""
    return all(ours.get(key) == theirs.get(key) for key in MACHINE)


def other_protocol(ours: Perplexity, theirs: Perplexity) -> str:
    """Returns in words how the second measurement differs from the first; empty if it does not."""
    first, second = ({"name": "lighten", **each.protocol} for each in (ours, theirs))
    return ", ".join(f"another {WORDS.get(key, key)}" for key in differing(first, second))


def other_task(ours: Accuracy, theirs: Accuracy) -> str:
    """Returns in words how the tasks or their scoring differ; empty if they do not."""
    names = {"n": "number of tasks", "scorer": "scorer", "version": "version of the task", "metric": "metric"}
    names |= {"chat": "way of asking (one is a chat)", "system": "system text"}
    differ = (words for name, words in names.items() if getattr(ours, name) != getattr(theirs, name))
    return ", ".join(f"another {words}" for words in differ)


def other_setting(ours: Speed, theirs: Speed) -> str:
    """Returns in words how the measurements of speed differ; empty if they do not."""
    differ = [name for name in SETTING if getattr(ours, name, None) != getattr(theirs, name, None)]
    return ", ".join(f"another {name}" for name in differ)
