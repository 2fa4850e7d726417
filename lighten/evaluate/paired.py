"""Reading measurements for paired changes: position by position, task by task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESULT = "result.json"
VALUES = "values.safetensors"
Z95 = 1.959964


def student95(freedom: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t, within 1 % from 3 degrees of freedom, 3 % at 2.

    Expansion in 1 / freedom of Abramowitz and Stegun, 26.7.5.
    """
    z, v = Z95, freedom
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    return z + first + second + third + fourth


def read(measurement: Path) -> dict[str, Any]:
    """Returns the aggregates of a measurement."""
    try:
        result: dict[str, Any] = json.loads((measurement / RESULT).read_text(encoding="utf-8"))
        return result
    except (OSError, ValueError) as error:
        raise Failure(f"{measurement} is not a measurement: cannot read its {RESULT} ({error})") from error


def values(measurement: Path) -> dict[str, NDArray[Any]]:
    """Returns the values of every position or task of a measurement."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, NDArray[Any]] = load_file(measurement / VALUES)
        return found
    except (OSError, SafetensorError) as error:
        raise Failure(f"{measurement / VALUES} cannot be read: {error}") from error
