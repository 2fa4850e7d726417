"""The required form of an `artifact.json`."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

KEY = re.compile(r"[0-9a-f]{64}")
"""Pattern of the key of a stage: a SHA-256 in hexadecimal digits."""
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
DIGEST = "sha256"
"""Name of the digest of the manifest itself. Manifests of earlier versions of lighten have none."""


def digest(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest without its own digest. Spaces and the order of keys do not matter."""
    value = json.loads(json.dumps({name: each for name, each in manifest.items() if name != DIGEST}))
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fault(manifest: Any) -> str | None:
    """Returns what is wrong with the form of a manifest; None if nothing is."""
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
    if manifest.get(DIGEST, digest(manifest)) != digest(manifest):
        return "its content differs from its SHA-256"
    return None
