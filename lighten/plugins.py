"""Tables of what packages can add: one row for each name, "module:Class", our rows and those of installed packages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from lighten.errors import Failure, RequestError


def found_at(place: str) -> Any:
    """Imports and returns the object at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class Table:
    """Names, and where the class of each name is: our rows, then those of packages that declare entry points.

    Nothing is imported before a class is asked for. An installed package may run code, as any package may. A package
    cannot replace a name of ours, in whatever case it writes the name.
    """

    def __init__(
        self,
        what: str,
        group: str,
        rows: Mapping[str, str],
        *,
        base: str | None = None,
        key: str | None = None,
        taken: Collection[str] = (),
    ) -> None:
        """Makes a table.

        Args:
            what: name of a row in messages ("runtime").
            group: group of entry points.
            rows: our rows.
            base: class that the classes of packages derive from, "module:Class".
            key: attribute or field of these classes whose value is the name of the row.
            taken: further names that packages cannot add.
        """
        self.what = what
        self.group = group
        self.rows = dict(rows)
        self.base = base
        self.key = key
        self.taken = {name.casefold() for name in (*rows, *taken)}

    @cached_property
    def declared(self) -> dict[str, list[EntryPoint]]:
        """The entry points of packages, by name."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            found.setdefault(entry.name, []).append(entry)
        return found

    @property
    def added(self) -> list[str]:
        """Names that packages add."""
        return [name for name in self.declared if name.casefold() not in self.taken]

    @property
    def names(self) -> list[str]:
        """All names, ours first."""
        return [*self.rows, *self.added]

    def load(self, name: str) -> Any:
        """Imports and returns the class of a name.

        Raises:
            RequestError: the name does not exist.
            Failure: the package that brings it cannot be imported, or brings something else. The message names it.
        """
        if name in self.rows:
            return found_at(self.rows[name])
        if name not in self.added:
            raise RequestError(f"there is no {self.what} {name!r}; there is {', '.join(self.names)}")
        entries = self.declared[name]
        packages = " and ".join(sorted({_package(entry) for entry in entries}))
        if len(entries) > 1:
            raise Failure(f"{self.what} {name} comes from several packages, {packages}: remove all but one of them")
        place = entries[0].value
        advice = f"{self.what} {name} comes from the package {packages}, whose {place}"
        try:
            found = entries[0].load()
        except (Exception, SystemExit) as error:  # whatever somebody else's module raises
            reason = f"{type(error).__name__}: {error}"
            raise Failure(f"{advice} cannot be imported ({reason}): mend or remove that package") from error
        if fault := self._fault(found, name):
            raise Failure(f"{advice} {fault}: mend or remove that package")
        return found

    def usable(self) -> dict[str, Any]:
        """Returns the class of every name, without those of packages that `faults` names."""
        return {name: self.load(name) for name in self.names if name not in self.broken}

    @cached_property
    def broken(self) -> dict[str, str]:
        """The names whose class cannot be used, each with the message that `load` gives."""
        found = {}
        for name in self.added:
            try:
                self.load(name)
            except Failure as error:
                found[name] = str(error)
        return found

    def faults(self) -> list[str]:
        """Returns what is wrong with the packages that add rows: a message for each."""
        hidden = [entry for name, entries in self.declared.items() if name not in self.added for entry in entries]
        shown = [
            f"{self.what} {each.name} of the package {_package(each)} is not used: lighten has it" for each in hidden
        ]
        return [*self.broken.values(), *shown]

    def _fault(self, found: Any, name: str) -> str | None:
        """Returns what is wrong with the class of a package, None if nothing is."""
        if self.base and not (isinstance(found, type) and issubclass(found, found_at(self.base))):
            return f"does not derive from {self.base.replace(':', '.')}"
        if self.key and name not in (own := _names_of(found, self.key)):
            return f"has the {self.key} {', '.join(map(repr, own)) or None}, and not {name!r}"
        return None


def _package(entry: EntryPoint) -> str:
    """Returns the name and the version of the package that declares an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _names_of(found: Any, key: str) -> list[Any]:
    """Returns what a class calls itself: the value of an attribute, or the choices or the default of a field."""
    field = getattr(found, "model_fields", {}).get(key)
    if field is None:
        return [getattr(found, key)] if hasattr(found, key) else []
    return list(get_args(field.annotation)) or [field.default]
