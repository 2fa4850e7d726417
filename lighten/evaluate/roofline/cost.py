"""The cost of a million tokens on a machine with a price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HOUR = 3600.0


def cost(rows: Sequence[dict[str, Any]], price_per_hour: float, currency: str) -> dict[str, Any] | None:
    """Returns the price of a million tokens, read and written, at the fastest of the measured shapes.

    None if no speed was measured.
    """
    found: dict[str, float | None] = {}
    shapes = []
    for name, field in (("prefill", "prefill_tok_s"), ("decode", "decode_tok_s")):
        best = max((row for row in rows if row.get(field)), key=lambda row: row[field], default=None)
        found[name] = None
        if best:
            found[name] = price_per_hour / HOUR / best[field] * 1e6
            shapes.append(f"{name} at batch size {best['batch']}, prompt {best['prompt']}")
    if not shapes:
        return None
    note = f"the machine does nothing else: {', '.join(shapes)}"
    return {"per_million_tokens": found, "price_per_hour": price_per_hour, "currency": currency, "note": note}
