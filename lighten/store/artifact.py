"""An artifact: a directory with a manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import Failure
from lighten.store.files import MANIFEST, hash_files
from lighten.store.files import write_file as write_file
from lighten.store.files import write_json as write_json
from lighten.store.manifest import fault


@dataclass(frozen=True)
class Artifact:
    """An immutable directory and the facts of its `artifact.json`."""

    path: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """Full SHA-256 key of the stage that made it."""
        return str(self.manifest["key"])

    @property
    def format(self) -> str:
        """Format of the files: "hf", "gptq", "gguf", "grams", "measurement"."""
        return str(self.manifest["format"])

    @property
    def facts(self) -> dict[str, Any]:
        """Format facts: bits, group size, tensor types, …"""
        return dict(self.manifest.get("facts", {}))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(int(entry["size"]) for entry in self.manifest["files"])


def read_artifact(path: Path) -> Artifact:
    """Opens a directory that holds an `artifact.json`.

    Raises:
        Failure: the manifest is absent, cannot be read, or lacks something.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(f"{path} is not a lighten artifact: cannot read its {MANIFEST} ({error})") from error
    if wrong := fault(manifest):
        raise Failure(f"{path} is not a lighten artifact: its {MANIFEST} is damaged ({wrong})")
    return Artifact(path, manifest)


def find_damage(artifact: Artifact) -> list[str]:
    """Hashes an artifact again. Returns one line per file that is missing, extra or changed; empty if sound."""
    found = {entry["path"]: entry for entry in hash_files(artifact.path)}
    expected = {entry["path"]: entry for entry in artifact.manifest["files"]}
    damage = [f"{name}: not in the manifest" for name in found if name not in expected]
    damage += [f"{name}: a link, and no file of its own" for name in found if (artifact.path / name).is_symlink()]
    for name, entry in expected.items():
        if name not in found:
            damage.append(f"{name}: missing")
        elif found[name]["sha256"] != entry["sha256"]:
            damage.append(f"{name}: content differs from its SHA-256 {entry['sha256'][:12]}…")
    return damage
