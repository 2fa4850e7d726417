"""Fetching a model from the Hugging Face hub. An error on the way is one message, and fetched files are kept."""

from __future__ import annotations

import importlib
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError, disk_full

TRIES = 3
"""Number of times that a broken connection is opened again. Files that have arrived are not fetched again."""
PAUSE = 2.0
"""Seconds before a connection is opened again."""


def http_library() -> Any:
    """Returns the library that speaks HTTP, which depends on the version of huggingface_hub."""
    from huggingface_hub import get_session

    return importlib.import_module(type(get_session()).__module__.partition(".")[0])


def fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Returns the directory in the hub's cache with the files of a repository that match the patterns.

    The hub's list of files comes first, and every file of it must exist at the end. If the hub cannot be reached,
    huggingface_hub returns whatever its cache holds, which is half a model if an earlier fetch broke.

    Raises:
        RequestError: this person has no such repository or revision, and no directory has that name.
        Failure: the connection broke, or the disk is full.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    broken: Exception | None = None
    expected: dict[str, int | None] | None = None
    for number in range(TRIES):
        time.sleep(PAUSE if number else 0)
        try:
            expected = expected or listed(model, revision, patterns)
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
            lacking = [name for name, size in (expected or {}).items() if not _arrived(folder / name, size)]
            if not lacking:
                return folder
            broken = Failure(f"not arrived: {', '.join(lacking[:3])}{' and more' if len(lacking) > 3 else ''}")
        except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response else 0
            if status >= 500 or expected is not None:
                broken = error
                continue
            raise RequestError(
                f"{model}: no such directory here, and it could not be fetched from the hub ({first_line(error)}); "
                "check the name, the revision and the connection, or give a local directory"
            ) from error
        except (http_library().HTTPError, OSError, RuntimeError) as error:
            if full := disk_full(error):
                raise full from error
            broken = error
    assert broken is not None
    raise Failure(
        f"{model}: the connection to {constants.ENDPOINT} broke {TRIES} times while fetching it "
        f"({first_line(broken)}): check it and run the same command again; files that have arrived are kept"
    ) from broken


def listed(model: str, revision: str | None, patterns: list[str]) -> dict[str, int | None] | None:
    """Returns the files of a repository that match the patterns, with their sizes in bytes if the hub has them.

    None if the hub cannot be reached or refuses. The cache may still hold all of them.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    http = http_library()
    try:
        found = HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
    except (http.ConnectError, http.TimeoutException, HfHubHTTPError, OfflineModeIsEnabled):
        return None
    wanted = [file for file in found if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    return {file.rfilename: file.size for file in wanted}


def _arrived(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without a full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")
