"""What an `artifact.json` has to hold."""

from __future__ import annotations

import re
from typing import Any

KEY = re.compile(r"[0-9a-f]{64}")
"""Of a stage: a SHA-256 in hexadecimal digits."""
NEEDED: dict[str, type] = {"key": str, "format": str, "files": list}
FURTHER: dict[str, type] = {
    "kind": str,
    "facts": dict,
    "warnings": list,
    "parents": list,
    "config": dict,
    "source": dict,
}
"""Parts that may be absent, and their types."""


def fault(manifest: Any) -> str | None:
    """Returns what is wrong with the form of a manifest, or None."""
    if not isinstance(manifest, dict):
        return "it holds no object"
    for name, kind in {**NEEDED, **FURTHER}.items():
        if name in NEEDED and name not in manifest:
            return f"{name} is missing"
        if not isinstance(manifest.get(name, kind()), kind):
            return f"{name} is of another type"
    if not KEY.fullmatch(manifest["key"]):
        return "key is no SHA-256"
    for entry in manifest["files"]:
        kinds = {"path": str, "size": int, "sha256": str}
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
            return "an entry of files lacks its path, size or sha256"
    return None
