"""Whether two measurements were made alike; numbers that were not are never set against each other."""

from __future__ import annotations

from lighten.results.measured import Accuracy, Free, Perplexity, Speed

OWN = ("dtype", "tokenizer", "data")
"""What may differ in a protocol: how the artifact itself is stored, whose tokenizer gave the same ids, and what the
text is called."""
WORDS = {
    "data_sha256": "text",
    "ids_sha256": "tokens of the text (another tokenizer)",
    "bos": "beginning-of-text token",
    "chunks": "number of chunks",
}
MACHINE = ("cpu", "cores", "gpus")
"""What makes a machine another one."""
SETTING = ("batch", "prompt", "generate", "dtype", "attention", "compile", "cache", "draft")
"""What makes a speed another measurement."""


def differing(ours: Free, theirs: Free) -> list[str]:
    """Returns the settings in which two protocols of perplexity differ, but for those that may."""
    keys = [key for key in sorted({*ours, *theirs}) if key not in OWN and ours.get(key) != theirs.get(key)]
    if len(keys) > 1:  # other tokens follow from another text, length or number of chunks
        keys = [key for key in keys if key != "ids_sha256"]
    return keys


def same_machine(ours: Free, theirs: Free) -> bool:
    """Returns whether speeds of two machines can be compared."""
    return all(ours.get(key) == theirs.get(key) for key in MACHINE)


def other_protocol(ours: Perplexity, theirs: Perplexity) -> str:
    """Returns in words how the second was measured otherwise than the first; nothing if it was not."""
    first, second = ({"name": "lighten", **each.protocol} for each in (ours, theirs))
    return ", ".join(f"another {WORDS.get(key, key)}" for key in differing(first, second))


def other_task(ours: Accuracy, theirs: Accuracy) -> str:
    """Returns in words how the tasks or their scoring differ."""
    told = {"n": "number of tasks", "scorer": "scorer", "version": "version of the task", "metric": "metric"}
    return ", ".join(f"another {words}" for name, words in told.items() if getattr(ours, name) != getattr(theirs, name))


def other_setting(ours: Speed, theirs: Speed) -> str:
    """Returns in words in what the measurements of speed differ."""
    differ = [name for name in SETTING if getattr(ours, name, None) != getattr(theirs, name, None)]
    return ", ".join(f"another {name}" for name in differ)
