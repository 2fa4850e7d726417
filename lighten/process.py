"""Runs one function in a process of its own: its memory is its own, and a crash is one message.

The child gets `{"target": "module:function", "payload": {...}}` as JSON on standard input and calls
`function(payload, report)`. It answers with JSON lines on its standard output: progress, then a result or an
error. Whatever libraries print goes to standard error, of which the end is kept for the message.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import IO, Any

from lighten.errors import Failure, LightenError, RequestError
from lighten.stage import Report, silent


@dataclass(frozen=True)
class Outcome:
    """What a function in another process returned, and what it took."""

    value: Any
    seconds: float
    peak_rss_bytes: int


def run_isolated(target: str, payload: dict[str, Any], report: Report = silent) -> Outcome:
    """Calls `module:function` in a fresh interpreter with `payload` (JSON) and waits for it.

    Raises:
        RequestError, Failure: as raised by the function, or a Failure if the process crashed.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            [sys.executable, "-m", "lighten.process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise
        )
        try:
            final = _converse(child, {"target": target, "payload": payload}, report)
        except BaseException:
            child.kill()
            child.wait()
            raise
        code = child.wait()
        if final is None:
            raise Failure(f"{target} crashed ({_death(code)}). The end of what it printed:\n{_tail(noise)}")
    if "error" in final:
        raise (RequestError if final["request"] else Failure)(final["error"])
    return Outcome(final["value"], time.monotonic() - start, int(final["peak_rss_bytes"]))


def _converse(child: subprocess.Popen[bytes], task: dict[str, Any], report: Report) -> dict[str, Any] | None:
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(task).encode())
        child.stdin.close()
    except BrokenPipeError:
        return None
    final: dict[str, Any] | None = None
    for line in child.stdout:
        event = json.loads(line)
        if "progress" in event:
            report(*event["progress"])
        else:
            final = event
    return final


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = ", often because memory ran out" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _tail(noise: IO[bytes], limit: int = 2000) -> str:
    noise.seek(0)
    return noise.read().decode(errors="replace")[-limit:].strip() or "(nothing)"


def peak_rss_bytes() -> int:
    """Returns this process's own peak resident memory, file-backed pages included."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def share_cores() -> None:
    """Lets idle OpenMP threads spin for a moment only and then sleep; call before torch is imported.

    Spinning for long makes two processes on the same cores many times slower; not spinning at all made GPTQ, with its
    small products, three times slower.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that kill -9 leaves nothing running."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _explain(error: BaseException) -> dict[str, Any]:
    if isinstance(error, LightenError):
        return {"error": str(error), "request": isinstance(error, RequestError)}
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error):
        advice = "free some space (`lighten gc` removes objects that no version uses) or choose another --artifacts"
        return {"error": f"no space left on the device: {advice}; then run the same command again", "request": False}
    where = "".join(traceback.format_exception(error)[-3:])
    return {"error": f"{type(error).__name__}: {error}\n{where}", "request": False}


def _main() -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and kills this process
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    task = json.load(sys.stdin)

    def report(done: int, total: int, note: str) -> None:
        events.write(json.dumps({"progress": [done, total, note]}) + "\n")

    module, _, name = task["target"].partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(task["payload"], report)
        event = {"value": value, "peak_rss_bytes": peak_rss_bytes()}
    except BaseException as error:  # every error becomes one message for the parent
        event = _explain(error)
    events.write(json.dumps(event) + "\n")
    events.flush()
    os._exit(0)  # some libraries' exit hooks hang or crash after the work is done


if __name__ == "__main__":
    _main()
