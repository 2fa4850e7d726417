"""Rows that another machine measured, added to the rows of a run."""

from __future__ import annotations

from collections.abc import Iterable

from lighten.report.numbers import significant
from lighten.results.results import Results, Variant
from lighten.store.names import elsewhere


def add(results: Results, others: Iterable[Results]) -> Results:
    """Returns the results with further rows, each named after its machine. A row of the same name is replaced.

    A merged row keeps its machine in `facts`. Its perplexity is that of another text, so it becomes a note. Its
    differences from the baseline of the other machine are left out.
    """
    rows = {variant.name: variant for variant in results.variants}
    for other in others:
        name = str(other.machine.get("name") or other.machine.get("cpu") or "another machine")
        for variant in other.variants:
            row = variant if variant.elsewhere else _row(variant, other, name)
            rows[row.name] = row
    return results.model_copy(update={"variants": list(rows.values())})


def _row(variant: Variant, other: Results, name: str) -> Variant:
    notes = list(variant.notes)
    for perplexity in variant.perplexities:
        data = perplexity.protocol.get("data", "another text")
        protocol = "" if perplexity.by == "lighten" else f" by the protocol {perplexity.by}"
        notes.append(f"perplexity {significant(perplexity.value, 4)} on {data}{protocol}")
    changes = {
        "name": elsewhere(variant.name, name),
        "key": None,
        "path": None,
        "perplexity": None,
        "other_perplexity": [],
        "delta": None,
        "facts": {**variant.facts, "machine": other.machine},
        "notes": notes,
    }
    return Variant.model_validate(variant.model_dump() | changes)
