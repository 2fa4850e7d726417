"""The models that can be measured: every source that can be compressed, and what only a runtime knows."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lighten.evaluate.runtimes.choose import added, naming_broken
from lighten.model.source import Found, find
from lighten.store.artifact import read_artifact
from lighten.store.files import MANIFEST, hash_file
from lighten.store.links import follow


def find_measurable(model: str, *, trust_remote_code: bool = False, merge_adapter: bool = False) -> Found:
    """Returns the place of a model that is to be measured. Arguments and errors are those of `find`."""
    path = Path(model).expanduser()
    path = follow(path) if path.parent.name == "variants" and path.is_file() else path
    for runtime in added() if path.exists() else []:
        if (place := runtime.recognises(path)) is not None:
            return Found(model, place, _format(path) or runtime.name, _identity(place), runtime.facts(place))
    with naming_broken():
        return find(model, trust_remote_code=trust_remote_code, merge_adapter=merge_adapter)


def _format(path: Path) -> str | None:
    """Returns the format in an artifact's manifest."""
    folder = path if path.is_dir() else path.parent
    return str(read_artifact(folder).format) if (folder / MANIFEST).is_file() else None


def _identity(place: Path) -> str:
    if place.is_file():
        return hash_file(place)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    listing = "".join(f"{file.relative_to(place)} {hash_file(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
