"""What `lighten gc` and `lighten verify` remove: unreferenced objects, what killed runs left, and damaged objects."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lighten.errors import Failure
from lighten.store.files import UNFINISHED, remove_tree
from lighten.store.locks import is_locked
from lighten.store.manifest import KEY
from lighten.store.store import Store


@dataclass(frozen=True)
class Checked:
    """The result of checking an object."""

    key: str
    damage: list[str] = field(default_factory=list)
    kept: str | None = None
    """Reason why a damaged object was not removed."""


def check(store: Store) -> Iterator[Checked]:
    """Hashes every object again. A damaged one is removed, unless a run needs it or the store is read-only."""
    for key in store.finished():
        try:
            damage = store.damage(key)
        except (Failure, OSError) as error:
            yield Checked(key, [str(error)], "it cannot be read")
            continue
        checked = _removed(store, key, damage) if damage else Checked(key)
        if checked:
            yield checked


def _removed(store: Store, key: str, damage: list[str]) -> Checked | None:
    """Removes a damaged object; returns None if it no longer exists."""
    if not store.writable():
        return Checked(key, damage, "the artifacts directory is read-only")
    with store.gate(), store.lock(key, wait=False) as free:
        if not free or key in store.leased():
            return Checked(key, damage, "a run under way needs it: verify again when that has ended")
        if not (store.objects / key).exists():
            return None
        store.remove(key)
    return Checked(key, damage)


def collect(store: Store, *, dry_run: bool = False) -> list[tuple[str, int]]:
    """Removes what is not needed any more. Returns (name, bytes) of each, without empty locks.

    Leases are read before references. A run publishes before it gives its lease back, so its objects are in one of the
    two. New leases wait until everything has been chosen.

    Raises:
        Failure: a version does not say what it refers to.
    """
    if not store.objects.is_dir():
        return []
    removed: list[tuple[str, int]] = []
    doomed = []
    with contextlib.nullcontext() if dry_run else store.gate():
        leased = store.leased()
        for path in _unneeded(store, store.referenced() | leased, leased, dry_run):
            if path.parent != store.root / "costs":
                removed.append((_shown(store, path), _size(path)))
            if not dry_run:
                doomed += _out_of_the_way(store, path)
        if not dry_run:
            _drop_locks(store)
    for path in doomed:
        remove_tree(path)
    return removed


def _out_of_the_way(store: Store, path: Path) -> list[Path]:
    """Removes what is small and hides what may be large. Returns what can be removed later."""
    if path.name.startswith(".gone-"):
        return [path]
    if path.parent in (store.objects, store.root / "unfinished"):
        return [store.hide(path)]
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
    return []


def _unneeded(store: Store, keep: set[str], leased: set[str], dry_run: bool) -> Iterator[Path]:
    """Yields what nobody needs, and holds the lock of its object or recipe meanwhile; a dry run takes no lock."""
    for folder in (store.objects, store.root / "unfinished", store.root / "costs"):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            key = next(iter(KEY.findall(path.name)), None)
            whole = folder.name != "unfinished" and path.name in (key, f"{key}.json")
            if key is None or key in (keep if whole else leased):
                continue
            with _free(store, key, dry_run) as free:
                if free:
                    yield path
    for folder in _recipes(store):
        with _free(store, f"version-{folder.name}", dry_run) as free:
            if free:
                yield from _left_beside(folder)


def _recipes(store: Store) -> list[Path]:
    """Returns the directories of recipes. Other directories beside them do not belong to the store."""
    names = {version.parent.name for version in store.versions()}
    names |= {lock.stem.removeprefix("version-") for lock in (store.root / "locks").glob("version-*.lock")}
    return [folder for name in sorted(names) if (folder := store.root / name).is_dir()]


def _left_beside(folder: Path) -> Iterator[Path]:
    """Yields what killed runs left in the directory of a recipe."""
    yield from sorted(folder.glob(".tmp-*"))
    if (link := folder / ".latest").is_symlink() or link.exists():
        yield link
    for version in sorted(folder.glob("v*")):
        for path in sorted(version.rglob(".*")):
            if path.is_file() and re.fullmatch(UNFINISHED, path.name):
                yield path
    if not any(path.name != ".latest" and not path.name.startswith(".tmp-") for path in folder.iterdir()):
        yield folder


@contextlib.contextmanager
def _free(store: Store, name: str, dry_run: bool) -> Iterator[bool]:
    """Yields whether a lock is free, and holds it meanwhile; a dry run does not take it."""
    if dry_run:
        yield not is_locked(store.root / "locks" / f"{name}.lock")
        return
    with store.lock(name, wait=False) as held:
        yield held


def _drop_locks(store: Store) -> None:
    """Removes locks and leases that nobody holds. Call it inside the gate."""
    gate = store.root / "locks" / "gate.lock"
    for file in [*(store.root / "locks").iterdir(), *(store.root / "leases").iterdir()]:
        if file == gate:
            continue
        with contextlib.suppress(FileNotFoundError):
            if file.suffix == ".lock":
                with store.lock(file.stem, wait=False) as held:
                    if held:
                        file.unlink()
            elif not is_locked(file):
                file.unlink()


def _shown(store: Store, path: Path) -> str:
    if path.parent in (store.objects, store.root / "unfinished"):
        return path.name
    return str(path.relative_to(store.root))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            if file.is_file() and not file.is_symlink():
                total += file.stat().st_size
    return total
