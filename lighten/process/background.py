"""A program that runs beside this process and never outlives it: not after Ctrl-C, and not after kill -9.

Between the two stands a keeper, a small process of its own. It starts the program in a new session, so that Ctrl-C does
not reach it, and reads its own input. The system ends that input together with this process. Then the keeper ends
everything in the session: a program may have started others.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

from lighten.errors import Failure
from lighten.process.isolate import death, die_with, environment, interpreter

GRACE = 5.0
"""Seconds that a program gets to end itself."""
UNSTARTED = 127
"""Exit code of a keeper whose program cannot be started, as a shell's."""
LONGEST_LINE = 600


class Background:
    """A program with its log. It is started at once, and ended by `close`."""

    def __init__(self, title: str, command: list[str], env: dict[str, str], folder: Path, log: Path) -> None:
        """Starts a program.

        Args:
            title: name for messages.
            command: program and arguments. No shell reads them.
            env: its whole environment.
            folder: its working directory.
            log: file that gets what it prints.
        """
        self.title, self.log = title, log
        with log.open("wb") as printed:
            self._keeper = subprocess.Popen(
                [*interpreter(), "-m", "lighten.process.background"],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                env=environment(),
            )
        assert self._keeper.stdin
        asked = {"command": command, "env": env, "folder": str(folder)}
        with contextlib.suppress(BrokenPipeError):  # its log says why it has ended
            self._keeper.stdin.write(json.dumps(asked).encode() + b"\n")
            self._keeper.stdin.flush()

    @property
    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        code = self._keeper.poll()
        return None if code is None else death(code)

    def check(self, when: str) -> None:
        """Raises Failure with the end of its log if it has ended."""
        if ended := self.ended:
            raise Failure(f"{self.title} ended {when} ({ended}): {self.last_line()}; its log is {self.log}")

    def text(self) -> str:
        """Returns what it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        """Returns the last line that it printed and that is not empty."""
        lines = [line.strip() for line in self.text().splitlines()]
        return next((line[:LONGEST_LINE] for line in reversed(lines) if line), "it printed nothing")

    def close(self) -> None:
        """Ends it, and everything that it has started."""
        assert self._keeper.stdin
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(2 * GRACE)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


def _keep() -> None:
    """Runs the program that the first line of the input names, until it ends or the input does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = json.loads(sys.stdin.buffer.readline())
    try:
        program = subprocess.Popen(
            asked["command"],
            env=asked["env"],
            cwd=asked["folder"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
    except OSError as error:
        print(f"{asked['command'][0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(UNSTARTED)
    threading.Thread(target=_end_with_input, args=(program.pid,), daemon=True).start()
    code = program.wait()
    _signal(program.pid, signal.SIGKILL)  # what it has left running
    if code < 0:
        with contextlib.suppress(OSError, ValueError):  # end in the same way
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


def _end_with_input(session: int) -> None:
    while sys.stdin.buffer.read(1 << 10):
        pass
    _signal(session, signal.SIGTERM)
    time.sleep(GRACE)
    _signal(session, signal.SIGKILL)


def _signal(session: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, number)


if __name__ == "__main__":
    _keep()
