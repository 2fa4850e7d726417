"""The models that can be measured: every source that can be compressed, what only a runtime knows, and servers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lighten.errors import RequestError
from lighten.evaluate.runtimes.choose import added, naming_broken
from lighten.evaluate.runtimes.endpoint.address import Address, is_url
from lighten.evaluate.runtimes.endpoint.opener import served
from lighten.facts import ModelFacts
from lighten.model.source import Found, find
from lighten.store.artifact import read_artifact
from lighten.store.files import MANIFEST, hash_file
from lighten.store.links import follow


@dataclass(frozen=True)
class Served:
    """A model on a server, which somebody else started. No file of it is here."""

    name: str
    """Address for the person, without paths of this machine."""
    path: str
    """Address as `Address` reads it."""
    facts: ModelFacts
    size_bytes: int | None
    """Bytes of its weights; None if the server does not say."""
    form: ClassVar[str] = "endpoint"
    notes: tuple[str, ...] = ("measured over HTTP from this machine: times include the network",)
    adapter: None = None

    @property
    def address(self) -> Address:
        """The address in its parts."""
        return Address.parse(self.path)


def find_measurable(model: str, *, trust_remote_code: bool = False, merge_adapter: bool = False) -> Found:
    """Returns the place of a model that is to be measured. Arguments and errors are those of `find`."""
    if is_url(model):
        raise RequestError(
            f"{model} is on a server, and this needs the files of a model: `lighten evaluate` measures it"
        )
    path = Path(model).expanduser()
    path = follow(path) if path.parent.name == "variants" and path.is_file() else path
    for runtime in added() if path.exists() else []:
        if (place := runtime.recognises(path)) is not None:
            return Found(model, place, _format(path) or runtime.name, _identity(place), runtime.facts(place))
    with naming_broken():
        return find(model, trust_remote_code=trust_remote_code, merge_adapter=merge_adapter)


def find_all(
    models: list[str], say: Callable[[str], None], *, trust_remote_code: bool = False, merge_adapter: bool = False
) -> list[Found | Served]:
    """Returns the places of models that are to be measured side by side, those on servers too.

    A model on a server takes the tokenizer of the first model, if that is one on this machine and its address names
    none. `say` gets a line whenever a server has to be waited for. Other arguments and errors are those of
    `find_measurable`, and those of `served`.
    """
    found: list[Found | Served] = []
    for model in models:
        if not is_url(model):
            found.append(find_measurable(model, trust_remote_code=trust_remote_code, merge_adapter=merge_adapter))
            continue
        address, first = Address.parse(model), found[0] if found else None
        if address.tokenizer is None and isinstance(first, Found):
            address = address.reading_with(first.path)
        address, facts, size = served(str(address), say)
        found.append(Served(address.shown, str(address), facts, size))
    return found


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
