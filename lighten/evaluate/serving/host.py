"""The server of a variant: started when its first measurement needs it, kept for the next ones, ended afterwards."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.request import ProxyHandler, build_opener

from lighten.errors import Failure
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.serving import SERVERS
from lighten.evaluate.serving.program import HOST, Installed, Job, Program, Start
from lighten.evaluate.serving.settings import Serve
from lighten.process.background import Background
from lighten.store.names import as_name

POLL_SECONDS = 0.2
ANSWER_SECONDS = 10.0
"""Seconds that a server which is up may take to say what it serves."""
POSITIONS = 8192
"""Length of the texts that a server must take, unless the model takes fewer or a measurement has longer ones."""


def program_of(serve: Serve) -> Program:
    """Returns what starts a server."""
    made: Program = SERVERS.load(serve.program)()
    return made


def positions(context: int | None, longest: int = 0) -> int:
    """Returns how many positions a server is started with.

    Args:
        context: positions that the model takes; None if it does not say.
        longest: length of the longest text of a measurement; 0 if it is not known.
    """
    wanted = max(POSITIONS, longest)
    return min(wanted, context) if context else wanted


@dataclass(frozen=True)
class Wanted:
    """A model, and the server that it is to be measured in."""

    place: Path
    """The model's directory, or its .gguf file."""
    name: str
    """Name of its row, which names the log too."""
    serve: Serve
    positions: int
    device: str


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    address: Address
    facts: dict[str, Any]
    """What it is, and what its log says of the model, for results."""


class Host:
    """At most one server at a time. It is the first one that is asked for, until another one is."""

    def __init__(self, logs: Path | None, say: Callable[[str], None]) -> None:
        """Prepares for servers; nothing is started or written yet.

        Args:
            logs: directory for their logs; None for a new one among the temporary files, which stays.
            say: gets lines for the person.
        """
        self.logs, self.say = logs, say
        self._wanted: Wanted | None = None
        self._program: Background | None = None
        self._running: Running | None = None
        self._failed: dict[Wanted, str] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="lighten-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the server."""
        self._end()
        self._folder.cleanup()

    def serving(self, wanted: Wanted) -> Running:
        """Returns the server of a model, and starts it if it does not run. Another one is ended before.

        Raises:
            Failure: it does not start or has ended. It is not started again.
        """
        if reason := self._failed.get(wanted):
            raise Failure(reason)
        if self._wanted != wanted or self._running is None:
            self._end()
            try:
                self._start(wanted)
            except Failure as error:
                self._failed[wanted] = str(error)
                raise
        assert self._running
        self.check(wanted, "before it was asked")
        return self._running

    def check(self, wanted: Wanted, when: str) -> None:
        """Raises Failure if the server of a model has ended. Then it is not started again."""
        if self._wanted != wanted or self._program is None:
            return
        try:
            self._program.check(when)
            if lost := program_of(wanted.serve).lost(self._program.text()):
                raise Failure(f"{self._program.title} serves nothing {when}: {lost}; its log is {self._program.log}")
        except Failure as error:
            self._failed[wanted] = str(error)
            raise

    def why(self, wanted: Wanted, error: str) -> str:
        """Returns why a measurement failed: how the server of a model ended, else the error itself."""
        until = time.monotonic() + ANSWER_SECONDS
        while self._wanted == wanted and self._running and time.monotonic() < until:
            try:
                self.check(wanted, "while it was asked")
            except Failure as ended:
                return str(ended)
            address = self._running.address
            if lists(int(address.host.rpartition(":")[2]), address.model or ""):
                break
            time.sleep(POLL_SECONDS)
        return error

    def _start(self, wanted: Wanted) -> None:
        program = program_of(wanted.serve)
        installed = program.installed(wanted.serve)
        job = Job(wanted.place.absolute(), as_name(wanted.name), free_port(), wanted.positions, wanted.device)
        start = program.start(job, installed)
        if self.logs is None:
            self.logs = Path(tempfile.mkdtemp(prefix="lighten-servers-"))
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{as_name(wanted.name)}.log"
        title = f"{program.name} ({installed.title})" if installed.title else program.name
        self.say(f"{title} starts for {wanted.name}: its log is {log}")
        env = {**installed.env, **start.env}
        command = [*start.command, *wanted.serve.args]
        self._wanted = wanted
        self._program = Background(title, command, env, Path(self._folder.name), log)
        began = time.monotonic()
        try:
            self._wait(self._program, program, start, job.port, wanted.serve.start)
        except BaseException:
            self._end()
            raise
        url = f"http://{HOST}:{job.port}/v1"
        facts = {
            "with": program.name,
            "packages": installed.packages,
            **({"args": [*wanted.serve.args]} if wanted.serve.args else {}),
            "start_seconds": round(time.monotonic() - began, 1),
            **program.loaded(self._program.text()),
        }
        self._running = Running(Address(url, start.model, wanted.place.absolute()), facts)

    def _wait(self, running: Background, program: Program, start: Start, port: int, seconds: float) -> None:
        """Waits until the server lists the model, and has loaded it.

        Raises:
            Failure: it ends before, cannot load the model, or does not answer in time.
        """
        deadline = time.monotonic() + seconds
        while not (lists(port, start.model) and program.ready(f"http://{HOST}:{port}/v1", start.model)):
            if lost := program.lost(running.text()):
                raise Failure(f"{running.title} cannot serve the model: {lost}; its log is {running.log}")
            if ended := running.ended:
                why = program.cause(running.text()) or running.last_line()
                raise Failure(f"{running.title} ended before it answered ({ended}): {why}; its log is {running.log}")
            if time.monotonic() > deadline:
                raise Failure(
                    f"{running.title} does not answer after {seconds:.0f} s (start: SECONDS gives it more): "
                    f"{running.last_line()}; its log is {running.log}"
                )
            time.sleep(POLL_SECONDS)

    def _end(self) -> None:
        if self._program:
            self._program.close()
        self._wanted = self._program = self._running = None


def free_port() -> int:
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def lists(port: int, model: str) -> bool:
    """Returns whether a server on this machine answers, and serves a model. Proxies of the environment are not used."""
    try:
        with build_opener(ProxyHandler({})).open(f"http://{HOST}:{port}/v1/models", timeout=ANSWER_SECONDS) as answer:
            found = json.load(answer)
        return any(each.get("id") == model for each in found["data"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return False


def checked(serve: Serve) -> Installed:
    """Returns the environment of a server.

    Raises:
        RequestError: it has not what the server needs.
    """
    return program_of(serve).installed(serve)
