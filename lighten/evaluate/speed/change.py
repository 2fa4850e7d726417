"""The change of speed at a shape that both were measured at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.evaluate.paired import read


def change(measured: Path, baseline: Path) -> dict[str, Any]:
    """Returns `{decode_speed_ratio}` at the first batch and lengths that both have; None if they share none.

    Raises:
        Failure: a measurement cannot be read.
    """
    return {"decode_speed_ratio": ratio(read(measured)["speed"], read(baseline)["speed"])}


def ratio(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> float | None:
    """Returns the ratio of decode speeds at the first batch and lengths that both have; None if they share none."""
    by_shape = {_shape(row): row["decode_tok_s"] for row in reversed(base)}
    common = [row for row in rows if _shape(row) in by_shape]
    return common[0]["decode_tok_s"] / by_shape[_shape(common[0])] if common else None


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("batch", "prompt", "generate"))
