"""OpenVINO's package, imported without the part that reports its use over the network."""

from __future__ import annotations

import sys
from typing import Any

from lighten.errors import missing_extra

TELEMETRY = "openvino_telemetry"
"""Package that openvino does without where it is not installed."""


def load(purpose: str) -> Any:
    """Returns the module `openvino`; its telemetry stays off in this process.

    Raises:
        RequestError: it is not installed.
    """
    if TELEMETRY not in sys.modules:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise missing_extra("openvino", "openvino", purpose) from error
    return openvino
