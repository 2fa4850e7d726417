"""The contract of every server that lighten can start."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from pydantic import JsonValue

from lighten.errors import RequestError
from lighten.evaluate.serving.settings import Serve
from lighten.process.isolate import environment, interpreter

ASK_SECONDS = 120
"""Seconds that the Python of another environment gets to say what is installed there."""
HOST = "127.0.0.1"
FILES = {"torch": "model directories", "llama.cpp": ".gguf files", "mlx": "MLX directories"}
"""What the files of a runtime are called in messages."""
FOREIGN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
"""Environment variables that are of this Python only."""
ASKED = """
import json, sys
from importlib import metadata, util
top, *names = sys.argv[1:]
lacks = [name for name in names if util.find_spec(name) is None]
found = {}
if not lacks:
    brings = getattr(metadata, "packages_distributions", dict)().get(names[0], [names[0]])
    for name in [*brings, *top.split()]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
print(json.dumps({"lacks": lacks, "packages": found}))
"""
"""Program for another Python: it says which modules are missing, and versions, first those of the server's package."""


@dataclass(frozen=True)
class Job:
    """What a server is to serve, and where."""

    place: Path
    """The model's directory, or its .gguf file."""
    name: str
    """Name for the model, where the server takes one."""
    port: int
    positions: int
    """Length of the longest text."""
    device: str
    """"cpu", "cuda" or "cuda:N"."""


@dataclass(frozen=True)
class Start:
    """A command, and the name under which the server lists the model."""

    command: list[str]
    model: str
    env: dict[str, str]


@dataclass(frozen=True)
class Installed:
    """The environment of a server."""

    python: list[str]
    """Command of its Python."""
    env: dict[str, str] = field(repr=False)
    """Environment of the server's process."""
    packages: dict[str, str]
    """Versions, that of the server first."""
    program: Path | None = None
    """The server itself, if it is no module of a Python."""

    @property
    def title(self) -> str:
        """Package and version of the server."""
        return " ".join(next(iter(self.packages.items()), ("", ""))).strip()


class Program:
    """A server: what it needs, and its command. A subclass sets the attributes and implements `start`."""

    name: ClassVar[str]
    """Name in the table of servers."""
    modules: ClassVar[tuple[str, ...]]
    """Modules that its Python must have, that of the server first."""
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    """Further packages whose versions its numbers depend on."""
    install: ClassVar[str]
    """What pip installs, for messages."""
    own: ClassVar[tuple[str, ...]] = ("--host", "--port", "--model")
    """Arguments that lighten gives itself."""
    serves: ClassVar[tuple[str, ...]] = ("torch",)
    """Names of the runtimes whose files it serves; a subclass may give a single one as a string."""

    def __init_subclass__(cls) -> None:
        """Takes a single name that a subclass gives."""
        given: object = cls.serves
        if isinstance(given, str):
            cls.serves = (given,)

    def start(self, job: Job, installed: Installed) -> Start:
        """Returns the command that serves a model on `HOST`, without the person's own arguments."""
        raise NotImplementedError

    def loaded(self, log: str) -> dict[str, JsonValue]:
        """Returns what its log says of how it loaded the model."""
        return {}

    def cause(self, log: str) -> str | None:
        """Returns the line of its log that says why it ended; None for the last one."""
        return None

    def ready(self, url: str, model: str) -> bool:
        """Returns whether the server at a URL (".../v1") has loaded the model that it lists, and answers."""
        return True

    def lost(self, log: str) -> str | None:
        """Returns what its log says if it serves nothing, now or any more, and runs on; None if it serves."""
        return None

    def installed(self, serve: Serve) -> Installed:
        """Returns the environment that has the server.

        Raises:
            RequestError: the Python does not exist or does not answer, or a module is missing there.
        """
        if serve.python is None:
            found = _here(self.modules, self.packages)
        else:
            found = _there(self.modules, self.packages, serve.python.expanduser())
        if isinstance(found, Installed):
            return found
        if serve.python is not None:
            where, pip = str(serve.python), f"{serve.python} -m pip install"
        else:
            where, pip = "this environment", "pip install"
        other = "" if serve.python else ", or name the Python of an environment that has it (python: PATH)"
        raise RequestError(
            f"serving with {self.name} needs the module {found}, which {where} does not have: {pip} {self.install}"
            f"{other}"
        )

    def refuse(self, runtime: str, where: str) -> None:
        """Raises RequestError if it does not serve the files of a runtime; `where` begins the message."""
        if runtime not in self.serves:
            files = " and ".join(FILES.get(each, each) for each in self.serves)
            raise RequestError(
                f"{where}: {self.name} serves {files}, and this is for {runtime}: name another server, or leave it out"
            )


def _here(modules: tuple[str, ...], packages: tuple[str, ...]) -> Installed | str:
    """Returns what this environment has; or the first module that is missing."""
    for module in modules:
        if find_spec(module) is None:
            return module
    brings = packages_distributions().get(modules[0], [modules[0]])
    return Installed(interpreter(), environment(), _versions((*brings, *packages)))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _there(modules: tuple[str, ...], packages: tuple[str, ...], python: Path) -> Installed | str:
    """Returns what the environment of another Python has; or the first module that is missing.

    Raises:
        RequestError: there is no such Python, or it does not answer.
    """
    python = python.absolute()  # not resolved: a link into an environment is what makes it that environment's
    lacks, found = _asked(modules, packages, python)
    return lacks[0] if lacks else Installed([str(python)], _foreign(), dict(found))


def _foreign() -> dict[str, str]:
    """Returns the environment without what is for this Python only."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return {**kept, "PYTHONSAFEPATH": "1"}


@functools.cache
def _asked(modules: tuple[str, ...], packages: tuple[str, ...], python: Path) -> tuple[list[str], dict[str, str]]:
    """Returns the modules that another Python lacks, and the versions of its packages. Errors are those of `_there`."""
    advice = "give the path of the Python in the environment that has the server, such as ENVIRONMENT/bin/python"
    if not python.is_file():
        raise RequestError(f"there is no Python {python}: {advice}")
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", ASKED, " ".join(packages), *modules],
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=True,
            env=_foreign(),
            cwd=python.parent,
        )
        said = json.loads(done.stdout.splitlines()[-1])
        return [str(each) for each in said["lacks"]], dict(said["packages"])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise RequestError(f"{python} is no Python that works ({last}): {advice}") from error
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"{python} is no Python that works ({type(error).__name__}: {error}): {advice}") from error
