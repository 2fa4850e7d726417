"""Objects, named by the key of the stage that made them, named versions, and the manifests that make both checkable.

A key is the SHA-256 of a stage's kind, version, settings and parents. An object's manifest has the SHA-256 of each of
its files.

    objects/<sha256>/…        one finished stage: its files and artifact.json, read-only
    <recipe>/v1/ v2/ latest   what a run left: links into objects/, results and report
    costs/<sha256>.json       what building an object took (not part of the object: it differs from run to run)
    locks/<sha256>.lock       held while an object is being built
    leases/<random>           keys that a process under way needs; as long as it lives, it holds the file's lock
    unfinished/<sha256>/…     checkpoints of a stage that can go on where it was killed

An object is written under a temporary name in the same directory and renamed, so a name that exists is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.store.artifact import Artifact, find_damage, read_artifact
from lighten.store.files import MANIFEST, flush, freeze, hash_files, remove_tree
from lighten.store.files import write_file as write_file
from lighten.store.files import write_json as write_json
from lighten.store.leases import declared, living
from lighten.store.links import follow, point
from lighten.store.locks import locked
from lighten.store.manifest import DIGEST, KEY, digest

OWN = ("objects", "locks", "costs", "leases", "unfinished")
"""Names in the store's directory that no recipe can have."""
_BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""Error numbers of reading that mean that a file is gone or broken."""
_VERSION = re.compile(r"v([1-9][0-9]*)")


def check_name(name: str) -> None:
    """Raises RequestError if a recipe cannot have a name because the store uses it itself."""
    if name in OWN:
        raise RequestError(f"a recipe cannot be named {name!r}: the store uses that name; choose another")


class Store:
    """The artifacts directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"

    def prepare(self) -> None:
        """Makes the store's own directories.

        Raises:
            RequestError: they cannot be made or written to.
        """
        folders = [self.objects, *(self.root / name for name in ("locks", "costs", "leases"))]
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RequestError(
                f"cannot use {self.root} as the artifacts directory: {error.strerror}; choose another with --artifacts"
            ) from error
        if not self.writable():
            raise RequestError(
                f"cannot use {self.root} as the artifacts directory: it is read-only; choose another with --artifacts, "
                "or make it writable"
            )

    def writable(self) -> bool:
        """Returns whether anything can be written to the store."""
        folders = [self.root, self.objects, *(self.root / name for name in ("locks", "costs", "leases"))]
        return all(os.access(folder, os.W_OK) for folder in folders if folder.is_dir())

    def find(self, key: str) -> Artifact | None:
        """Returns the object; None if it does not exist or its manifest is damaged. It hashes no file: see `sound`."""
        if not KEY.fullmatch(key):  # a key of somebody's results.json may be any text
            return None
        try:
            found = read_artifact(self.objects / key)
        except Failure:
            return None
        return found if found.key == key else None

    def damage(self, key: str) -> list[str]:
        """Hashes an object again. Returns one line for everything that is wrong with it.

        Raises:
            Failure, OSError: it cannot be read, because permission or open files are lacking.
        """
        try:
            found = read_artifact(self.objects / key)
            return find_damage(found) if found.key == key else [f"its {MANIFEST} is that of another object"]
        except (Failure, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno not in _BROKEN:
                raise  # what cannot be read just now may be sound
            return [str(error)]

    def sound(self, key: str, say: Callable[[str], None] = lambda message: None) -> Artifact | None:
        """Hashes an object again and returns it. A corrupt object is removed, and None is returned.

        Args:
            key: the object; call with its lock held.
            say: called with what was wrong with an object that was removed.
        """
        if not (self.objects / key).exists():
            return None
        if not (damage := self.damage(key)):
            return self.find(key)
        self.remove(key)
        say(f"the object {key[:12]} was damaged and is made anew: {'; '.join(damage[:3])}")
        return None

    def remove(self, key: str) -> None:
        """Deletes an object. The name disappears first, so that no process sees a part of it."""
        path = self.objects / key
        if path.exists():
            remove_tree(self.hide(path))

    def hide(self, path: Path) -> Path:
        """Gives something in `objects` that is to be removed another name, at once. Returns that name."""
        os.chmod(path, 0o755)
        key = KEY.findall(path.name)[0]
        doomed = self.objects / f".gone-{key}-{secrets.token_hex(4)}"
        return path.rename(doomed)

    @contextlib.contextmanager
    def lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Holds the lock of an object. Yields whether it was got (always with `wait`)."""
        self.prepare()
        with locked(self.root / "locks" / f"{key}.lock", wait=wait) as held:
            yield held

    @contextlib.contextmanager
    def lease(self, keys: Iterable[str]) -> Iterator[None]:
        """Declares objects that are needed: until the block ends, `gc` and `verify` remove none of them.

        A run, one step without a recipe, `doctor --calibration` and `compare` hold leases.

        The kernel drops the lease if the process dies. Take it before any lock of an object.

        Raises:
            RequestError: the store cannot be written to.
        """
        self.prepare()
        with declared(self.root / "leases", keys, self.gate):
            yield

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Holds, for a moment, the lock under which leases are declared and objects are chosen for removal."""
        with self.lock("gate"):
            yield

    def leased(self) -> set[str]:
        """Returns the keys that living runs have declared. Dead runs do not count."""
        return living(self.root / "leases")

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """Yields an empty temporary directory for the object. Call with its lock held, then `finish` it.

        What an earlier killed run left under this key is removed first. The directory is removed if it was not
        finished.
        """
        self.prepare()
        for stale in self.objects.glob(f".tmp-{key}-*"):
            remove_tree(stale)
        path = Path(tempfile.mkdtemp(dir=self.objects, prefix=f".tmp-{key}-"))
        os.chmod(path, 0o755)
        try:
            yield path
        finally:
            if path.exists():
                remove_tree(path)

    def scratch(self, key: str) -> Path:
        """Returns a directory that outlives a kill; `drop_scratch` removes it once the object is finished."""
        path = self.root / "unfinished" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def drop_scratch(self, key: str) -> None:
        """Removes what `scratch` returned, if it is there."""
        shutil.rmtree(self.root / "unfinished" / key, ignore_errors=True)

    def finish(self, path: Path, manifest: dict[str, Any]) -> Artifact:
        """Hashes what lies under `path`, writes its manifest, makes it read-only and gives it its name."""
        complete = {"schema": 1, **manifest, "files": hash_files(path)}
        complete[DIGEST] = digest(complete)
        write_json(path / MANIFEST, complete)
        freeze(path)
        target = self.objects / str(manifest["key"])
        if not target.exists():
            os.chmod(path, 0o755)
            path.rename(target)
            os.chmod(target, 0o555)
            flush(self.objects)
        return Artifact(target, complete)

    def cost(self, key: str) -> dict[str, Any] | None:
        """Returns the cost of building an object; None if it is not known."""
        try:
            value = json.loads((self.root / "costs" / f"{key}.json").read_text())
        except (OSError, ValueError, RecursionError):
            return None
        kinds: dict[str, Any] = {"what": str, "seconds": (int, float), "nominal_seconds": (int, float)}
        whole = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())
        return value if whole else None

    def costs(self) -> list[dict[str, Any]]:
        """Returns every recorded cost."""
        keys = sorted(path.stem for path in (self.root / "costs").glob("*.json"))
        return [cost for key in keys if (cost := self.cost(key))]

    def record_cost(self, key: str, cost: dict[str, Any]) -> None:
        """Keeps the cost of building an object."""
        self.prepare()
        write_json(self.root / "costs" / f"{key}.json", cost)

    # versions

    def versions(self, name: str | None = None) -> list[Path]:
        """Returns the version directories of one recipe, or of all, oldest first."""
        pattern = f"{name or '*'}/v*"
        found = [path for path in self.root.glob(pattern) if _VERSION.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: (path.parent.name, int(path.name[1:])))

    def latest(self, name: str) -> Path | None:
        """Returns the newest version of a recipe, or None."""
        found = self.versions(name)
        return found[-1] if found else None

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[None]:
        """Holds the lock of a recipe's versions. Read the latest version and add the next one inside it.

        Raises:
            RequestError: the store uses that name itself.
        """
        check_name(name)
        with self.lock(f"version-{name}"):
            self.point_latest(name)
            yield

    def point_latest(self, name: str) -> None:
        """Makes the link `latest` lead to the newest version, if a killed run left it behind. Call when publishing."""
        newest, link = self.latest(name), self.root / name / "latest"
        if newest and (not link.exists() or follow(link) != newest.resolve()):
            point(link, newest.name)

    @contextlib.contextmanager
    def new_version(self, name: str) -> Iterator[Path]:
        """Yields a temporary directory that becomes the next version of `name` if the block ends without an error.

        Call it inside `publishing`. What a killed run left beside the versions is removed first.
        """
        folder = self.root / name
        self.prepare()
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(".tmp-*"):
            remove_tree(stale)
        path = Path(tempfile.mkdtemp(dir=folder, prefix=".tmp-"))
        os.chmod(path, 0o755)
        try:
            yield path
            for entry in [*path.rglob("*"), path]:
                if not entry.is_symlink():
                    flush(entry)
            last = self.latest(name)
            path.rename(folder / f"v{int(last.name[1:]) + 1 if last else 1}")
            flush(folder)
            self.point_latest(name)
        finally:
            if path.exists():
                remove_tree(path)

    def referenced(self) -> set[str]:
        """Returns the keys that any version refers to, with all keys that those were made from."""
        keys: set[str] = set()
        for version in self.versions():
            refs = version / "objects.json"
            try:
                found = json.loads(refs.read_text())
                if not (isinstance(found, list) and all(isinstance(key, str) and KEY.fullmatch(key) for key in found)):
                    raise ValueError("it is no list of keys")
            except (OSError, ValueError, RecursionError) as error:
                raise Failure(f"{refs} cannot be read ({error}): restore it or remove {version}") from error
            keys.update(found)
            links = version / "variants"
            keys.update(follow(link).name for link in (links.iterdir() if links.is_dir() else ()))
        return keys

    def finished(self) -> list[str]:
        """Returns the keys of all finished objects."""
        if not self.objects.is_dir():
            return []
        return sorted(path.name for path in self.objects.iterdir() if KEY.fullmatch(path.name))
