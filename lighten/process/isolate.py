"""Runs one function in a process of its own. Its memory is its own, and a crash is one message.

The call is `function(payload, report)`, with `payload` as JSON. The child answers with JSON lines: progress, then a
result or an error. What libraries print goes to a file, and the message has the end of it.

If the system can fork, children come from one process that has imported the large libraries and does nothing else. A
child starts in milliseconds instead of seconds, and shares their pages. That process has computed no product, so torch
has no threads that a fork would lose. A child finds every library as if it had imported the library itself.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import IO, Any

from lighten.errors import DiskFull, Failure, LightenError, RequestError, disk_full, unexpected
from lighten.step import Report, silent

PRELOADED = ("torch", "lighten.pipeline.steps", "transformers.models.llama.modeling_llama")
"""Libraries that the process of the children imports: the first at once, the rest while the first children run."""

CAN_FORK = sys.platform == "linux"

ALONE = "alone"
"""Argument of an interpreter that serves one task itself and has imported nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a function in another process returned, and its cost."""

    value: Any
    seconds: float
    peak_rss_bytes: int


def interpreter() -> list[str]:
    """Returns the command of a Python that imports nothing from its working directory, which may be a model's."""
    return [sys.executable, "-P"]


def environment() -> dict[str, str]:
    """Returns the environment for an interpreter whose children import nothing from the working directory either.

    An empty entry in PYTHONPATH, which a colon too many leaves, would mean the working directory.
    """
    kept = {**os.environ, "PYTHONSAFEPATH": "1"}
    if entries := [entry for entry in kept.pop("PYTHONPATH", "").split(os.pathsep) if entry]:
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, entries))
    return kept


class Nursery:
    """An interpreter that serves one task after the other, each in a forked child if the system can fork."""

    current: Nursery | None = None

    def __init__(self, *, alone: bool = False) -> None:
        self.env = dict(os.environ)
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this does
        self._process = subprocess.Popen(
            [*interpreter(), "-m", "lighten.process.isolate", *([ALONE] if alone else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            env=environment(),
        )

    @classmethod
    def ready(cls) -> Nursery:
        """Returns the running interpreter, or starts it. It starts a new one if the environment has changed."""
        found = cls.current
        if found and (found.env != dict(os.environ) or found._process.poll() is not None):
            found.close()
            found = None
        if not found:
            found = cls.current = cls()
            atexit.register(found.close)
        return found

    def close(self) -> None:
        """Ends the interpreter, and what runs in it."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.communicate()
        self._noise.close()
        if Nursery.current is self:
            Nursery.current = None

    def serve(self, task: dict[str, Any], report: Report) -> tuple[dict[str, Any] | None, int, str]:
        """Runs a task. Returns its last event, how its process ended, and the end of what it printed."""
        assert self._process.stdin and self._process.stdout
        start = os.fstat(self._noise.fileno()).st_size
        final, code = None, None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                event = json.loads(line)
                if "progress" in event:
                    report(*event["progress"])
                elif "ended" in event:
                    code = event["ended"]
                    break
                else:
                    final = event
        printed = _tail(self._noise, start)
        if code is None:  # it ended itself
            code = self._process.wait()
            self.close()
        return final, code, printed


def warm() -> None:
    """Starts importing what the next task will need."""
    if CAN_FORK:
        Nursery.ready()


def run_isolated(target: str, payload: dict[str, Any], report: Report = silent, *, fresh: bool = False) -> Outcome:
    """Calls `module:function` with `payload` (JSON) in another process and waits for it.

    Args:
        target: module and name of the function.
        payload: what it is called with.
        report: called with its progress.
        fresh: start from an interpreter that has imported nothing, for what is to be measured as users run it.

    Raises:
        RequestError, Failure: as raised by the function, or a Failure if the process crashed.
    """
    begin = time.monotonic()
    alone = fresh or not CAN_FORK
    nursery = Nursery(alone=True) if alone else Nursery.ready()
    task = {"target": target, "payload": payload, "cwd": os.getcwd()}
    try:
        final, code, printed = nursery.serve(task, report)
    except BaseException:
        nursery.close()
        raise
    if alone:
        nursery.close()
    if final is None:
        raise Failure(f"{target} crashed ({death(code)}). The end of what it printed:\n{printed}")
    if "error" in final:
        raise raised(final)
    return Outcome(final["value"], time.monotonic() - begin, int(final["peak_rss_bytes"]))


def death(code: int) -> str:
    """Returns how a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hints = {"SIGKILL": ", often because memory ran out", "SIGBUS": ", often because the disk is full"}
    hint = hints.get(name, "")
    return f"killed by {name}{hint}"


def _tail(noise: IO[bytes], start: int, limit: int = 2000) -> str:
    # by position: the children write through this very open file
    size = os.fstat(noise.fileno()).st_size
    first = max(start, size - limit)
    return os.pread(noise.fileno(), size - first, first).decode(errors="replace").strip() or "(nothing)"


def peak_rss_bytes() -> int:
    """Returns the peak resident memory, file-backed pages included, of this process and of workers it forked."""
    return _own_peak() + _helpers


def count_helpers(peak_bytes: int) -> None:
    """Adds the peak memory of workers of this process, without the pages that they share with it."""
    global _helpers
    _helpers = max(_helpers, peak_bytes)


_helpers = 0


def _own_peak() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def share_cores() -> None:
    """Makes idle OpenMP threads spin only for a moment, and torch take large pages. Call it before torch is imported.

    Long spinning makes two processes on the same cores many times slower. Without any spinning, GPTQ with its small
    products was three times slower.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, for work that needs the same memory again and again.

    Otherwise large blocks go back to the system, and every step of a training waits until their pages are made anew.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)


def share_arena() -> None:
    """Makes glibc give no further thread an arena of its own, for threads that take turns.

    What a thread frees stays in its arena, where no other thread finds it.
    """
    m_arena_max = -8
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


def give_back() -> None:
    """Makes glibc give free pages of all arenas back to the system. This takes milliseconds."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def die_with(parent: int) -> None:
    """Makes Linux kill this process when its parent dies, so that kill -9 leaves nothing running."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _explain(error: BaseException) -> dict[str, Any]:
    if full := disk_full(error):
        return {"error": str(full), "kind": DiskFull.__name__}
    if isinstance(error, LightenError):
        return {"error": str(error), "kind": (RequestError if isinstance(error, RequestError) else Failure).__name__}
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
        reason = str(error).partition(". ")[0]
        advice = "close what else uses it, lower the batch or the length, or take --device cpu"
        return {"error": f"the memory of the GPU does not suffice ({reason}): {advice}", "kind": Failure.__name__}
    return {"error": unexpected(error), "kind": Failure.__name__}


def raised(event: dict[str, Any]) -> LightenError:
    """Returns the error in an event of another process."""
    kinds = {kind.__name__: kind for kind in (DiskFull, Failure, RequestError)}
    return kinds[event["kind"]](event["error"])


def call(function: Any, *arguments: Any) -> dict[str, Any]:
    """Returns the event with what a function returned or raised. Every error becomes one message."""
    try:
        return {"value": function(*arguments), "peak_rss_bytes": peak_rss_bytes()}
    except BaseException as error:
        return _explain(error)


def _answer(task: dict[str, Any], events: int) -> None:
    with os.fdopen(events, "w", encoding="utf-8", buffering=1) as lines:

        def report(done: int, total: int, note: str) -> None:
            lines.write(json.dumps({"progress": [done, total, note]}) + "\n")

        def work() -> Any:
            os.chdir(task["cwd"])
            module, _, name = task["target"].partition(":")
            return getattr(importlib.import_module(module), name)(task["payload"], report)

        lines.write(json.dumps(call(work)) + "\n")
    os._exit(0)  # some libraries' exit hooks hang or crash after the work is done


def _serve() -> None:
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and kills this process
    events = os.dup(1)
    os.dup2(2, 1)
    if sys.argv[1:] == [ALONE]:
        _answer(json.loads(sys.stdin.readline()), events)
    share_cores()
    first, *waiting = PRELOADED
    importlib.import_module(first)
    own, one_core = os.getpid(), len(os.sched_getaffinity(0)) == 1
    for line in sys.stdin.buffer:
        task = json.loads(line)
        while waiting and one_core:  # the first child would import the same beside this process
            importlib.import_module(waiting.pop(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: numpy's are prepared for it
            child = os.fork()
        if not child:
            die_with(own)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _answer(task, events)
        while waiting and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            importlib.import_module(waiting.pop(0))
        _, status = os.waitpid(child, 0)
        os.write(events, (json.dumps({"ended": os.waitstatus_to_exitcode(status)}) + "\n").encode())


if __name__ == "__main__":
    _serve()
