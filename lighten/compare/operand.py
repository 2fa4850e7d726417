"""The meaning of `quickstart@v1:gptq`: a version, a variant of one, or a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lighten.errors import RequestError, nearest
from lighten.results.file import FILE, load
from lighten.results.results import Results, Variant
from lighten.store.store import Store

FORMS = "give NAME, NAME@v1, NAME:VARIANT, a version's directory, a results.json, or a model's directory or file"


@dataclass(frozen=True)
class Version:
    """Results, and their directory."""

    text: str
    """Name that the person gave."""
    results: Results
    folder: Path

    @property
    def store(self) -> Store | None:
        """Store that the version belongs to; None for results that lie elsewhere."""
        root = self.folder.resolve().parent.parent
        return Store(root) if (root / "objects").is_dir() else None


@dataclass(frozen=True)
class VariantOf:
    """One row of a version."""

    text: str
    version: Version
    row: Variant


@dataclass(frozen=True)
class Model:
    """A model directory, a file, a hub id or demo:NAME."""

    text: str


Operand = Version | VariantOf | Model


def resolve(text: str, artifacts: Path) -> Operand:
    """Returns the version, variant or model that a person named.

    Raises:
        RequestError: nothing has that name; the message has the nearest names.
    """
    path = Path(text).expanduser()
    if path.parent.name == "variants" and (path.parent.parent / FILE).is_file():
        return variant_of(text, find_version(str(path.parent.parent), artifacts), path.name)
    version = _version(text, artifacts)
    if version:
        return version
    if path.exists():
        return Model(text)
    name, colon, variant = text.rpartition(":")
    if colon and (version := _version(name, artifacts)):
        return variant_of(text, version, variant)
    if text.startswith("demo:") or re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return Model(text)
    raise _unknown(name if colon else text, artifacts)


def find_version(text: str, artifacts: Path) -> Version:
    """Returns the version that a person named.

    Raises:
        RequestError: no version has that name, or its results have another schema.
        Failure: its results are damaged.
    """
    if found := _version(text, artifacts):
        return found
    raise _unknown(text, artifacts)


def variant_of(text: str, version: Version, name: str) -> VariantOf:
    """Returns a row of a version.

    Raises:
        RequestError: the variant does not exist, or failed.
    """
    row = next((each for each in version.results.variants if each.name == name), None)
    if row is None:
        names = [each.name for each in version.results.variants]
        raise RequestError(f"{version.results.title} has no variant {name!r}{_near(name, names)}")
    if row.failed:
        raise RequestError(f"{text} failed, so there is nothing to compare: {row.error}")
    return VariantOf(text, version, row)


def _version(text: str, artifacts: Path) -> Version | None:
    path = Path(text).expanduser()
    if path.is_dir() and (path / FILE).is_file():
        return Version(text, load(path), path)
    if path.is_file() and path.suffix == ".json":
        return Version(text, load(path), path.parent)
    store = Store(artifacts)
    name, at, number = text.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return None
    versions = {folder.name: folder for folder in store.versions(name)}
    if ":" in number:
        return None  # a variant of that version
    if at and versions and number not in versions:
        raise RequestError(f"{name} has no version {number!r}; there is {', '.join(versions)}")
    folder = versions.get(number) if at else store.latest(name)
    return Version(text, load(folder), folder) if folder else None


def _unknown(text: str, artifacts: Path) -> RequestError:
    known = sorted({folder.parent.name for folder in Store(artifacts).versions()})
    there = _near(text, known) if known else f"; {artifacts} holds no versions yet"
    return RequestError(f"there is no version and no model {text!r}{there}; {FORMS}")


def _near(name: str, known: list[str]) -> str:
    close = nearest(name, known)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(known)}"
