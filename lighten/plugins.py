"""Tables of what packages can add: one row for each name, "module:Class", our rows and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from lighten.errors import Failure, RequestError


def found_at(place: str) -> Any:
    """Imports and returns the object at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class Table:
    """Names, and where the object of each name is: our rows, then those of packages that declare entry points.

    Nothing is imported before an object is asked for. An installed package may run code, as any package may. A package
    cannot replace a name of ours.
    """

    def __init__(self, what: str, group: str, rows: Mapping[str, str]) -> None:
        """Takes the name of a row in messages ("runtime"), the group of entry points, and our rows."""
        self.what = what
        self.group = group
        self.rows = dict(rows)

    @cached_property
    def places(self) -> dict[str, str]:
        """Place of each object, "module:Class", by name; our own rows come first."""
        added = {entry.name: entry.value for entry in entry_points(group=self.group)}
        return {**self.rows, **{name: place for name, place in added.items() if name not in self.rows}}

    @property
    def names(self) -> list[str]:
        """All names, ours first."""
        return list(self.places)

    def load(self, name: str) -> Any:
        """Imports and returns the object of a name.

        Raises:
            RequestError: the name does not exist.
            Failure: the package that brings it cannot be imported, or lacks the object.
        """
        if name not in self.places:
            raise RequestError(f"there is no {self.what} {name!r}; there is {', '.join(self.places)}")
        place = self.places[name]
        if name in self.rows:
            return found_at(place)
        try:
            return found_at(place)
        except Exception as error:  # whatever somebody else's module raises
            raise Failure(
                f"{self.what} {name} comes from an installed package, whose {place} cannot be imported "
                f"({type(error).__name__}: {error}): mend or remove that package"
            ) from error
