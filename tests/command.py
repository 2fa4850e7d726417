"""`lighten` as a person calls it, for tests that call it often.

A command of its own process imports the command line, and then a second process imports torch and transformers, before
anything is done: three seconds and more, for every call. `lighten` here hands its arguments to one process that stays,
which runs the same `main` in the directory that is asked for, with files for its output; what it isolates then runs in
children of one warm process, as the stages of one recipe do. `process` is the real thing, a process for the call: each
command is called that way at least once, and wherever signals, the environment or the interpreter matter.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar

from lighten.process.isolate import die_with

TIMEOUT = 300
"""Seconds that a command may take."""

Done = subprocess.CompletedProcess[str]


def process(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
    """Runs a command in a process of its own."""
    command = [sys.executable, "-m", "lighten", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=_environment() | (env or {}), capture_output=True, text=True, timeout=TIMEOUT
    )


def lighten(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
    """Runs a command in the process that stays, one for each environment."""
    return _Shared.ready(_environment() | (env or {})).run([str(each) for each in arguments], cwd or Path.cwd())


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


class _Shared:
    """A process that stays, for one environment."""

    kept: ClassVar[list[_Shared]] = []
    """Those that are running, the one that was used last at the end."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.command"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.env,
            text=True,
        )

    @classmethod
    def ready(cls, env: dict[str, str]) -> _Shared:
        """Returns the one that is running in an environment, or starts it. Two are kept: a test may need another."""
        for each in list(cls.kept):
            if each._process.poll() is not None:
                each.close()
        found = next((each for each in cls.kept if each.env == env), None)
        if found:
            cls.kept.remove(found)
        else:
            for each in cls.kept[:-1]:
                each.close()
            found = cls(env)
            atexit.register(found.close)
        cls.kept.append(found)
        return found

    def run(self, arguments: list[str], cwd: Path) -> Done:
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ("out", "err")]
            task = {"arguments": arguments, "cwd": str(cwd), "files": files}
            watchdog = _Watchdog(self._process)
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(task) + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
            watchdog.stop()
            printed = [Path(file).read_text() if Path(file).is_file() else "" for file in files]
        if not answer:  # it was killed, or ended itself
            code = self._process.wait()
            self.close()
            raise AssertionError(f"lighten {arguments} ended the process it ran in ({code}):\n{printed[1]}")
        return subprocess.CompletedProcess(["lighten", *arguments], json.loads(answer)["code"], *printed)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._process.kill()
        self._process.communicate()
        if self in _Shared.kept:
            _Shared.kept.remove(self)


class _Watchdog:
    """Kills a process that takes too long."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._timer = threading.Timer(TIMEOUT, process.kill)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        self._timer.cancel()


def _serve() -> None:
    """Runs one command after the other, each with the command line imported anew, which reads its arguments there."""
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    here, environment = os.getcwd(), dict(os.environ)
    for line in sys.stdin:
        task = json.loads(line)
        code = _command(task)
        os.chdir(here)
        for name in {*os.environ, *environment}:
            if name not in environment:
                del os.environ[name]
            elif os.environ.get(name) != environment[name]:
                os.environ[name] = environment[name]
        os.write(answers, (json.dumps({"code": code}) + "\n").encode())


def _command(task: dict[str, Any]) -> int:
    """Runs a command with its output in files; returns its exit code."""
    kept = [os.dup(1), os.dup(2)]
    streams = sys.stdout, sys.stderr
    try:
        for number, file in enumerate(task["files"], 1):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
        os.chdir(task["cwd"])
        sys.argv = ["lighten", *task["arguments"]]
        sys.modules.pop("lighten.cli.main", None)
        try:
            from lighten.cli.main import main

            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = streams
        for number, each in enumerate(kept, 1):
            os.dup2(each, number)
            os.close(each)


if __name__ == "__main__":
    _serve()
