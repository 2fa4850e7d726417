"""What processes under way need of a store: a file of keys for each, whose lock it holds as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from lighten.errors import Failure
from lighten.store.locks import is_locked, take


@contextlib.contextmanager
def declared(folder: Path, keys: Iterable[str], gate: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Holds a lease of `keys`. It is taken inside `gate`, where nothing is chosen for removal meanwhile."""
    file = folder / secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        with gate():
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, descriptor)
            stack.callback(file.unlink, missing_ok=True)
            take(descriptor, fcntl.LOCK_EX, file)
            content = json.dumps(sorted(set(keys))).encode()
            while content:
                content = content[os.write(descriptor, content) :]
        yield


def living(folder: Path) -> set[str]:
    """Returns the keys of all leases that a process holds.

    Raises:
        Failure: a lease cannot be read.
    """
    keys: set[str] = set()
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        keys |= _read(file)
    return keys


def _read(file: Path) -> set[str]:
    for _ in range(100):
        if not is_locked(file):
            return set()
        with contextlib.suppress(OSError, ValueError):
            return set(json.loads(file.read_text()))
        time.sleep(0.05)  # its owner is writing it
    raise Failure(f"{file} cannot be read, and the run that made it goes on: try again when it has ended")
