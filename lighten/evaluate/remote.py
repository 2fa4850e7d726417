"""A device behind ssh."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO
from urllib.parse import urlsplit

from lighten.errors import Failure, LightenError, RequestError
from lighten.screen import visible

NO_PYTHON, NO_ROOM, UNREACHABLE = 71, 72, 255


MOST, LINE, TALK = 1 << 20, 4 << 20, 64 << 20
"""Bytes that a device may say: a script, bench.py in a line, and bench.py in all."""


SHOWN = 300
"""Maximum number of letters of a device's message that are shown."""


USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*|[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?")


_DROP = 'rm -rf -- "$d"; rmdir -- "${d%/*}" 2>/dev/null; :'


@dataclass(frozen=True)
class Address:
    """The address of a device."""

    host: str
    user: str | None
    port: int | None

    @property
    def name(self) -> str:
        """user@host:port, as far as given."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


def parse_target(target: str) -> Address:
    """Returns the address in ssh://[user@]host[:port].

    Raises:
        RequestError: anything else, and an address with a password.
    """
    try:
        parts = urlsplit(target)
        user, port = parts.username, parts.port
        host = parts.netloc.rpartition("@")[2].removesuffix(f":{port}").strip("[]")  # aliases of ssh have capitals
    except ValueError as error:
        raise RequestError(f"--target {target}: {error}; give ssh://user@host[:port]") from error
    if parts.password is not None:
        raise RequestError("--target takes no password: put a key on the device (ssh-copy-id) and leave it out")
    right = parts.scheme == "ssh" and HOST.fullmatch(host) and (user is None or USER.fullmatch(user))
    if not right or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise RequestError(f"--target {target} is not an address: give ssh://user@host[:port]")
    return Address(host, user, port)


class Device:
    """A machine that is reached by ssh."""

    def __init__(self, address: Address, key: str, python: str = "python3") -> None:
        self.address = address
        self._python = python
        self._key = key
        program = shlex.split(os.environ.get("LIGHTEN_SSH", "ssh"))
        options = ["-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15"]
        where = [*(["-p", str(address.port)] if address.port else []), *(["-l", address.user] if address.user else [])]
        self._command = [*program, *options, *where, "--", address.host]

    def start(self, script: str, **values: str) -> subprocess.Popen[bytes]:
        """Starts a script on the device; `values` are its variables."""
        given = {"python": self._python, **values}
        lines = [f"{name}={shlex.quote(value)}" for name, value in given.items()]
        lines.append("case $python in /*) ;; */*) python=$HOME/$python ;; esac")
        folder = 'd="${XDG_CACHE_HOME:-$HOME/.cache}/lighten/' + f'{self._key}"'
        whole = "\n".join(["LC_ALL=C; export LC_ALL; umask 077", *lines, folder, script])
        try:
            return subprocess.Popen(
                [*self._command, f"sh -c {shlex.quote(whole)}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError as error:
            raise RequestError("there is no ssh here: install it (Debian: apt install openssh-client)") from error

    def run(self, script: str, feed: Callable[[IO[bytes]], None] | None = None, **values: str) -> tuple[int, str, str]:
        """Runs a script on the device. Returns its exit code and output; `feed` writes its input."""
        process = self.start(script, **values)
        assert process.stdin and process.stdout and process.stderr
        errors: list[bytes] = []
        reader = threading.Thread(target=lambda pipe: errors.append(beginning(pipe)), args=(process.stderr,))
        reader.start()
        try:
            with suppress(BrokenPipeError):
                if feed:
                    feed(process.stdin)
                process.stdin.close()
            printed = process.stdout.read(MOST + 1)
            if len(printed) > MOST:
                raise Failure(f"{self.address.name} says more than any of lighten's scripts does: what answers there?")
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            reader.join()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.stderr.close()
        return code, printed.decode(errors="replace"), errors[0].decode(errors="replace")

    def drop(self) -> None:
        """Removes the copy."""
        with suppress(LightenError):
            self.run(_DROP)

    def trouble(self, doing: str, code: int, errors: str) -> Failure:
        """Returns one message about an error."""
        lines = [line.strip() for line in errors.splitlines() if line.strip() and "known hosts" not in line]
        reason = visible(lines[-1][:SHOWN]) if lines else f"exit code {code}"
        name, text = self.address.name, " ".join(lines)
        if "Permission denied" in text and code == UNREACHABLE:
            return Failure(f"{name} refuses the key ({reason}): make `ssh ssh://{name}` work without a password first")
        if "Host key verification failed" in text:
            return Failure(f"the host key of {name} is not known or has changed: connect once with ssh and check it")
        if code == NO_PYTHON:
            return Failure(f"{name} has no {self._python} of 3.9 or later: install it there, or give --python PATH")
        if code == NO_ROOM or "No space left" in text or "Disk quota" in text:
            return Failure(f"{name} has no room for the bundle ({reason}): free some space there")
        if code == UNREACHABLE:
            return Failure(f"{name} does not answer ({reason}): check the address and that its ssh server runs")
        return Failure(f"{name}: {doing} failed: {reason}")


def beginning(pipe: IO[bytes]) -> bytes:
    """Returns the first part of what a pipe gives, and drops the rest."""
    kept = b""
    while block := pipe.read(1 << 16):
        kept += block[: max(0, MOST - len(kept))]
    return kept
