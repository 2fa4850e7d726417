"""Facts whose names are not known in advance, as label and text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from lighten.report.allocation import allocated
from lighten.report.numbers import byte_count, significant
from lighten.results.measured import Free
from lighten.results.results import Results

NAMED = 6
"""Number of names that are listed before the rest is counted."""

LABELS = {"tensorrt": "TensorRT"}
"""What facts are called whose key is not their name."""

Pairs = list[tuple[str, str]]


def pairs(facts: Mapping[str, JsonValue]) -> Pairs:
    """Returns (label, text) of every fact, in the order given."""
    return [
        (LABELS.get(key) or key.replace("_", " ").removesuffix(" bytes"), text(value, key))
        for key, value in facts.items()
    ]


def settings(facts: Free) -> Free:
    """Returns the facts as label and text, without the allocation, which is drawn, and `kept`, which is a list."""
    elsewhere = {"kept", *(("allocation",) if allocated(facts) else ())}
    return {key: value for key, value in facts.items() if key not in elsewhere}


def kept(facts: Free) -> Pairs:
    """Returns (names, reason) of the modules that a variant left alone. Names with the same reason stand together."""
    found: dict[str, list[str]] = {}
    value = facts.get("kept")
    for entry in value if isinstance(value, list) else [value] if value else []:
        what, why = (entry.get("what"), entry.get("why")) if isinstance(entry, dict) else (entry, None)
        found.setdefault(text(why) if why else "", []).append(text(what))
    return [(_few(names), why) for why, names in found.items()]


def _few(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def text(value: JsonValue, key: str = "") -> str:
    """Returns a fact in words: `{"count": 180, "of": 272}` reads "180 of 272", `*_bytes` in MB, lists with commas."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int() if key.endswith("_bytes"):
            return byte_count(value)
        case int():
            return f"{value:,}"
        case float():
            return significant(value, 4)
        case str():
            return value
        case list():
            return ", ".join(text(item) for item in value) or "none"
        case dict() if set(value) == {"count", "of"}:
            return f"{text(value['count'])} of {text(value['of'])}"
        case {"supported": bool(taken), "lacks": list(lacks), "checked_with": str(by)} if key == "tensorrt":
            said = "knows all operators" if taken else f"does not take {_few([text(each) for each in lacks])}"
            return f"{said}, by {by}; not measured here"
        case dict():
            return ", ".join(f"{name} {text(item, name)}" for name, item in value.items()) or "none"


def protocols(results: Results) -> list[tuple[str, Pairs]]:
    """Returns the name and the settings of each protocol that perplexity was measured by.

    A setting that differs between variants names them: "F16 (gguf-f16), float32 (baseline, gptq-int4)".
    """
    found: dict[str, dict[str, Free]] = {}
    for variant in results.measured:
        for perplexity in variant.perplexities:
            protocol: Free = {**perplexity.protocol}
            if perplexity.tokens is not None:
                protocol.setdefault("tokens", perplexity.tokens)
            found.setdefault(perplexity.by, {})[variant.name] = protocol
    return [(name, _shared(each)) for name, each in found.items()]


def _shared(protocols: dict[str, Free]) -> Pairs:
    """Returns the settings of several variants. A setting that all share stands there once."""
    shared = []
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        whose: dict[str, list[str]] = {}
        for name, protocol in protocols.items():
            if key in protocol:
                ((label, words),) = pairs({key: protocol[key]})
                whose.setdefault(words, []).append(name)
        alike = len(whose) == 1 and len(whose[words]) == len(protocols)
        shared.append((label, words if alike else "; ".join(f"{said} ({', '.join(by)})" for said, by in whose.items())))
    return shared


def sentence(items: Iterable[tuple[str, str]]) -> str:
    """Returns pairs on one line: "data builtin; length 512"."""
    return "; ".join(f"{label} {value}" for label, value in items)
