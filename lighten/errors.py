"""Errors for the person at the keyboard.

Raise `RequestError` if the request itself was wrong (exit code 2), and `Failure` if something broke while doing a
correct request (exit code 1). The message says what was wrong, where, and what to do next.
"""

from __future__ import annotations

import difflib
import errno
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LIKENESS = 0.5
"""Likeness from which one name is offered for another: 0 is nothing in common, 1 is the same name."""


class LightenError(Exception):
    """One clear message for the person. It is never shown with a traceback."""

    exit_code = 1


class RequestError(LightenError):
    """The request was wrong: a recipe, a path, a setting, a missing extra."""

    exit_code = 2


class Failure(LightenError):
    """The request was fine, but something failed: broken input, a full disk, a crash."""


class DiskFull(Failure):
    """Nothing more can be written. What runs next would fail as well."""


def disk_full(error: BaseException | None) -> DiskFull | None:
    """Returns the message for an error, if the error or its cause is a full disk."""
    reasons = {
        errno.ENOSPC: "no space left on the device",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file is longer than the file system or the limit of the shell (ulimit -f) allows",
    }
    while error is not None:
        if isinstance(error, DiskFull):
            return error
        # libraries in other languages only give the text of the system
        code = error.errno if isinstance(error, OSError) else None
        known = code if code in reasons else next((each for each in reasons if os.strerror(each) in str(error)), None)
        if known is not None:
            return DiskFull(
                f"{reasons[known]}: free some space (`lighten gc` removes objects that no version uses) or choose "
                "another --artifacts; then run the same command again, which goes on from what is finished"
            )
        error = error.__cause__ or error.__context__
    return None


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Returns the known names that are most like a wrong one, for "did you mean": at most `most`, or none."""
    return difflib.get_close_matches(name, list(known), most, cutoff=LIKENESS)


def check_names(names: Iterable[str]) -> None:
    """Raises RequestError for a name that is no Unicode text. Reports and JSON could not name such a path."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise RequestError(f"{shown} is not UTF-8: rename that file or directory") from error


def unexpected(error: BaseException) -> str:
    """Returns one line about an unforeseen error: its message, and where in this package it arose.

    The traceback follows if the environment has LIGHTEN_TRACEBACK.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)] or list(frames)
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    message = " ".join(str(error).split())
    summary = f"{type(error).__name__}{': ' if message else ''}{message}{at}"
    if os.environ.get("LIGHTEN_TRACEBACK"):
        return summary + "\n" + "".join(traceback.format_exception(error))
    return f"{summary}; LIGHTEN_TRACEBACK=1 shows more"


@contextmanager
def reading(file: Path, advice: str) -> Iterator[None]:
    """Turns an error while the contents of a file are parsed into one message.

    Raises:
        Failure: the file lacks something, or has it in another form.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Failure(f"{file} is damaged ({type(error).__name__}: {error}): {advice}") from error


def missing_extra(extra: str, package: str, purpose: str) -> RequestError:
    """Returns the error for a missing package that an extra brings."""
    return RequestError(
        f"{purpose} needs the package {package}, which is not installed: pip install 'lighten[{extra}]'"
    )
