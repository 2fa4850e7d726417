"""Measurements through a server."""

from pathlib import Path
from typing import Any

from lighten.evaluate.run import measure
from lighten.step import silent
from tests.evaluate.conftest import payload

SMALL = {"length": 48, "samples": 3}
SPEED = {"prompt": 16, "generate": 4, "repeats": 2}
KEY = "sk-very-secret-0123"


def ran(name: str, settings: dict[str, Any], place: Path | str, out: Path) -> dict[str, Any]:
    """Returns the result of a measurement, which is written to a new directory."""
    out.mkdir()
    return measure(payload(name, settings, place, out), silent)  # type: ignore[arg-type]
