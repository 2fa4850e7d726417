"""Runs a command and tells its wall time, exit status and the peak memory of all its processes together.

Two measures, of which the larger counts. The kernel keeps the peak of each process: `ru_maxrss` of wait4 is that of
the largest one. And a few times a second the processes of the command's session are added up; where they came to
more than before, a page that several share is counted once (Linux, `smaps_rollup`: too slow to be read every time).
What a process held before exec counts too, so the command is started by
a small interpreter of its own: this file, run as a script.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Timed:
    """What a command took and left."""

    seconds: float
    """From its start to its exit, imports and loading included."""
    peak_bytes: int
    code: int
    """Exit status; minus the signal that ended it."""
    output: str
    noise: str
    """The end of standard error."""


def timed(
    command: Sequence[str], env: Mapping[str, str] | None = None, limit: float = 7200, where: str | None = None
) -> Timed:
    """Runs a command to its end in the directory `where`, or kills it and its descendants after `limit` seconds."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as noise:
        meter = subprocess.Popen(
            [sys.executable, "-S", os.path.abspath(__file__), str(limit), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=noise,
            env={**os.environ, **(env or {})},
            cwd=where,
        )
        try:
            code = meter.wait()
        except BaseException:
            assert meter.stdin
            meter.stdin.close()  # tells the meter to end what it runs
            meter.wait()
            raise
        output.seek(0)
        noise.seek(0)
        printed, errors = output.read().decode(errors="replace"), noise.read().decode(errors="replace")
    if code:
        raise SystemExit(f"could not run {command[0]}: {errors[-2000:]}")
    errors, _, facts = errors.rstrip("\n").rpartition("\n")
    return Timed(**json.loads(facts), output=printed, noise=errors[-20000:])


def last_json(text: str) -> dict[str, object]:
    """Returns the last line of a program's output that is a JSON object; empty if there is none."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                return value
    return {}


def _session(session: int) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry)) == session:
                found.append(f"/proc/{entry}")
    return found


def _resident(processes: list[str]) -> int:
    """Returns the pages that processes hold, shared ones as often as they are shared."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError, IndexError), open(f"{process}/statm", encoding="ascii") as sizes:
            total += int(sizes.read().split()[1])
    return total


def _proportional(processes: list[str]) -> int:
    """Returns the bytes that processes hold, shared pages in proportion."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError, StopIteration), open(f"{process}/smaps_rollup", encoding="ascii") as rollup:
            total += next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    return total


def _meter() -> None:
    limit, command = float(sys.argv[1]), sys.argv[2:]
    start = time.monotonic()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        end()

    signal.signal(signal.SIGINT, lambda *_: end())
    together = [0]

    def add_up() -> None:
        most = 0
        while True:
            processes = _session(child.pid)
            if (pages := _resident(processes)) > 1.01 * most:
                most = pages
                together[0] = max(together[0], _proportional(processes))
            time.sleep(SAMPLE_SECONDS)

    if sys.platform == "linux":
        threading.Thread(target=add_up, daemon=True).start()
    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    threading.Thread(target=end_with_parent, daemon=True).start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    end()  # whatever it left running
    unit = 1 if sys.platform == "darwin" else 1024
    facts = {"seconds": seconds, "peak_bytes": max(usage.ru_maxrss * unit, together[0]), "code": child.returncode}
    sys.stderr.write("\n" + json.dumps(facts) + "\n")
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _meter()
