"""Content-addressed objects, named versions, and the manifests that make both checkable.

    objects/<sha256>/…        one finished stage: its files and artifact.json, read-only
    <recipe>/v1/ v2/ latest   what a run left: links into objects/, results and report
    costs/<sha256>.json       what building an object took (not part of the object: it differs from run to run)
    locks/<sha256>.lock       held while an object is being built
    unfinished/<sha256>/…     checkpoints of a stage that can go on where it was killed

An object is written under a temporary name in the same directory and renamed, so a name that exists is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lighten.errors import Failure, RequestError

MANIFEST = "artifact.json"
KEY = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"v([1-9][0-9]*)")


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


def canonical(value: Any) -> str:
    """Returns `value` as JSON with one spelling only: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def stage_key(kind: str, version: int, config: dict[str, Any], parents: Iterable[str]) -> str:
    """Returns the SHA-256 (64 hex digits) of a step's kind, version, settings and its parents' keys."""
    identity = {"kind": kind, "version": version, "config": config, "parents": list(parents)}
    return hashlib.sha256(canonical(identity).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path) -> list[dict[str, Any]]:
    """Returns path, size and SHA-256 of every file under `root` but its manifest, sorted by path."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = list(pool.map(hash_file, paths))
    return [
        {"path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    ]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_file` does."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that readers see the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read_artifact(path: Path) -> Artifact:
    """Opens a directory that holds an `artifact.json`.

    Raises:
        Failure: no manifest there, or one that cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return Artifact(path, manifest)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} is not a lighten artifact: cannot read its {MANIFEST} ({error})") from error


def find_damage(artifact: Artifact) -> list[str]:
    """Re-hashes an artifact; returns one line per file that is missing, extra or changed (empty if sound)."""
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


def _remove(path: Path) -> None:
    """Removes a directory tree, read-only entries included."""

    def allow(function: Any, name: str, _error: Any) -> None:
        os.chmod(os.path.dirname(name), 0o755)
        os.chmod(name, 0o755)
        function(name)

    shutil.rmtree(path, onerror=allow)


def _freeze(path: Path) -> None:
    """Flushes a tree to disk and takes its write permissions away."""
    for entry in [*path.rglob("*"), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.chmod(entry, stat.S_IMODE(entry.stat().st_mode) & ~0o222)


class Store:
    """The artifacts directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"

    def _prepare(self) -> None:
        try:
            for folder in (self.objects, self.root / "locks", self.root / "costs"):
                folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise RequestError(f"cannot use {self.root} as the artifacts directory: {error}") from error

    def find(self, key: str) -> Artifact | None:
        """Returns the object, or None if there is none. Only its manifest is read: see `sound`."""
        path = self.objects / key
        return read_artifact(path) if (path / MANIFEST).is_file() else None

    def sound(self, key: str) -> Artifact | None:
        """Returns the object after re-hashing it; a corrupt one is removed and None is returned."""
        artifact = self.find(key)
        if artifact is None or not find_damage(artifact):
            return artifact
        self.remove(key)
        return None

    def remove(self, key: str) -> None:
        """Deletes an object; the name disappears first, so nobody sees half of it."""
        path = self.objects / key
        if path.exists():
            os.chmod(path, 0o755)
            doomed = self.objects / f".gone-{key}-{os.getpid()}"
            path.rename(doomed)
            _remove(doomed)

    @contextlib.contextmanager
    def lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Holds the lock of an object; yields whether it was got (always true with `wait`)."""
        self._prepare()
        lock = FileLock(self.root / "locks" / f"{key}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """Yields an empty temporary directory for the object; call with its lock held, then `finish` it.

        Whatever an earlier killed run left under this key is removed first; the directory is removed
        if it was not finished.
        """
        self._prepare()
        for stale in self.objects.glob(f".tmp-{key}-*"):
            _remove(stale)
        path = Path(tempfile.mkdtemp(dir=self.objects, prefix=f".tmp-{key}-"))
        os.chmod(path, 0o755)
        try:
            yield path
        finally:
            if path.exists():
                _remove(path)

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
        write_json(path / MANIFEST, complete)
        _freeze(path)
        target = self.objects / str(manifest["key"])
        if not target.exists():
            os.chmod(path, 0o755)
            path.rename(target)
            os.chmod(target, 0o555)
        return Artifact(target, complete)

    def cost(self, key: str) -> dict[str, Any] | None:
        """Returns what building an object took, or None if that is not known."""
        try:
            value: dict[str, Any] = json.loads((self.root / "costs" / f"{key}.json").read_text())
            return value
        except (OSError, ValueError):
            return None

    def costs(self) -> list[dict[str, Any]]:
        """Returns every recorded cost."""
        keys = sorted(path.stem for path in (self.root / "costs").glob("*.json"))
        return [cost for key in keys if (cost := self.cost(key))]

    def record_cost(self, key: str, cost: dict[str, Any]) -> None:
        """Keeps what building an object took."""
        self._prepare()
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
    def new_version(self, name: str) -> Iterator[Path]:
        """Yields a temporary directory that becomes the next version of `name` when the block ends well."""
        if name in ("objects", "locks", "costs", "unfinished"):
            raise RequestError(f"a recipe cannot be named {name!r}: the store uses that name; choose another")
        folder = self.root / name
        self._prepare()
        folder.mkdir(exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=folder, prefix=".tmp-"))
        os.chmod(path, 0o755)
        try:
            yield path
            with self.lock(f"version-{name}"):
                last = self.latest(name)
                number = int(last.name[1:]) + 1 if last else 1
                path.rename(folder / f"v{number}")
                link = folder / ".latest"
                with contextlib.suppress(FileNotFoundError):
                    link.unlink()
                link.symlink_to(f"v{number}")
                os.replace(link, folder / "latest")
        finally:
            if path.exists():
                _remove(path)

    def referenced(self) -> set[str]:
        """Returns the keys that any version refers to, with everything those were made from."""
        keys: set[str] = set()
        for version in self.versions():
            refs = version / "objects.json"
            try:
                keys.update(json.loads(refs.read_text()))
            except (OSError, ValueError) as error:
                raise Failure(f"{refs} cannot be read ({error}): restore it or remove {version}") from error
        return keys

    def finished(self) -> list[str]:
        """Returns the keys of all finished objects."""
        if not self.objects.is_dir():
            return []
        return sorted(path.name for path in self.objects.iterdir() if KEY.fullmatch(path.name))

    def verify(self) -> Iterator[tuple[str, list[str]]]:
        """Re-hashes every object; yields its key and its damage. A damaged object is removed."""
        for key in self.finished():
            try:
                damage = find_damage(read_artifact(self.objects / key))
            except (Failure, KeyError, TypeError) as error:
                damage = [f"{MANIFEST}: {error}"]
            if damage:
                with self.lock(key):
                    self.remove(key)
            yield key, damage

    def gc(self, *, dry_run: bool = False) -> list[tuple[str, int]]:
        """Removes objects that no version refers to and what killed runs left; returns (name, bytes) of each.

        An object that is being built right now is left alone.
        """
        keep = self.referenced()
        removed = []
        folders = [folder for folder in (self.objects, self.root / "unfinished") if folder.is_dir()]
        for path in sorted(path for folder in folders for path in folder.iterdir()):
            key = next(iter(KEY.findall(path.name)), None)
            if key is None or (path.name in keep and path.parent == self.objects):
                continue
            with self.lock(key, wait=False) as held:
                if not held:
                    continue
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                if not dry_run:
                    self.remove(key) if path == self.objects / key else _remove(path)
                    with contextlib.suppress(FileNotFoundError):
                        (self.root / "costs" / f"{key}.json").unlink()
                removed.append((path.name, size))
        return removed
