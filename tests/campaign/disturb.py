"""Disturbing lighten: kills, full disks, runs side by side, a read-only store; and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.store.files import MANIFEST
from lighten.store.gc import check, collect
from lighten.store.store import Store

from .subject import command, contents, lighten, published

STARTED = re.compile(r"^(.+) … ?(\(|$)")
ENDED = re.compile(r"^[✓✗] (.+?): ")
PAGE = 4096
PATIENCE = 600
"""Seconds after which a run counts as hanging."""
AHEAD = 2
"""A run is killed in one of the next so many stages that are to be done."""


@dataclass
class Undisturbed:
    """A recipe, and what a run of it leaves when nothing disturbs it."""

    recipe: dict[str, Any]
    contents: dict[str, str]
    results: dict[str, Any]
    stages: list[str]
    seconds: dict[str, float]
    """What each stage took; "publish" is what comes after the last, "start" what comes before the first."""
    bytes: int


@dataclass
class Tally:
    """What was done and what was found."""

    kills: Counter[str] = field(default_factory=Counter)
    """By the kind of what was going on."""
    gc_kills: int = 0
    damaged: int = 0
    full: Counter[str] = field(default_factory=Counter)
    """Disks that filled up, by what was going on."""
    together: int = 0
    gc_beside: int = 0
    read_only: int = 0
    checks: int = 0
    faults: list[str] = field(default_factory=list)


def kind_of(stage: str) -> str:
    """Returns the first word of a stage's name: quantize gptq and quantize rtn are of one kind."""
    return stage.split()[0]


class Running:
    """A run whose lines are followed as it prints them."""

    def __init__(self, line: list[str], **more: Any) -> None:
        self.begin = time.monotonic()
        self.process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **more
        )
        self.lines: list[str] = []
        self.moments: dict[str, float] = {}
        self.current = "start"

    def follow(self, until: str | None = None) -> bool:
        """Reads lines until a stage starts (or "publish": the last one ended); False if the run ended first."""
        assert self.process.stderr
        if until == "start":
            return True
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            event = None
            if found := STARTED.match(line):
                event = self.current = found[1]
            elif found := ENDED.match(line):
                event, self.current = f"✓ {found[1]}", "publish"  # or the next stage, which the next line tells
            if event:
                self.moments[event] = time.monotonic()
            if event and event == until:
                return True
        return False

    def kill(self) -> None:
        """Kills the run and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stderr
        self.process.stderr.close()

    def end(self) -> int:
        """Waits for the end; returns the exit code."""
        watchdog = threading.Timer(PATIENCE, self.kill)
        watchdog.start()
        try:
            self.follow()
            return self.process.wait()
        finally:
            watchdog.cancel()
            self.kill()


def undisturbed(recipe: dict[str, Any], store: Path) -> Undisturbed:
    """Runs a recipe to its end in peace."""
    running = Running(command(recipe, store))
    code = running.end()
    if code:
        raise SystemExit(f"{recipe['name']} fails even undisturbed:\n" + "\n".join(running.lines))
    stages = [name for name in running.moments if not name.startswith("✓ ")]
    took = {name: running.moments[f"✓ {name}"] - running.moments[name] for name in stages}
    last = max(running.moments.values())
    took |= {"start": running.moments[stages[0]] - running.begin, "publish": time.monotonic() - last}
    version = store / recipe["name"] / "v1"
    return Undisturbed(recipe, contents(store), published(version), stages, took, on_disk(store))


def on_disk(folder: Path) -> int:
    """Returns the bytes that a directory takes, in whole pages."""
    files = [path for path in folder.rglob("*") if not path.is_symlink()]
    return sum(-(-path.stat().st_size // PAGE) * PAGE + PAGE for path in files)


class Campaign:
    """Disturbs runs in a directory, and counts."""

    def __init__(self, folder: Path, seed: int, seed_store: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.seed_store = seed_store
        self.kept = contents(seed_store)
        self.kept_bytes = on_disk(seed_store)
        self.say = say
        self.tally = Tally()
        self.number = 0

    @property
    def killed(self) -> int:
        """Kills of runs so far."""
        return sum(self.tally.kills.values())

    def fresh(self, folder: Path | None = None) -> Path:
        """Returns a store in which one version has been published before."""
        self.number += 1
        store = (folder or self.folder) / f"store-{self.number}"
        shutil.copytree(self.seed_store, store, symlinks=True)
        return store

    def fault(self, text: str) -> None:
        """Notes that something did not hold."""
        self.tally.faults.append(text)
        self.say(f"FAULT: {text}")

    # kills

    def kill_on_the_way(
        self, whole: Undisturbed, kills: int, store: Path | None = None, begin: str | None = None
    ) -> int:
        """Runs a recipe, killed up to `kills` times on its way to the end; checks; returns the kills.

        `store` is where an earlier run came as far as the stage `begin`.
        """
        store = store or self.fresh()
        todo = [*(["start"] if self.random.random() < 0.3 else []), *whole.stages, "publish"]
        todo = todo[todo.index(begin) :] if begin in todo else todo
        done = 0
        while done < kills and todo:
            target = todo[self.random.randrange(min(AHEAD, len(todo)))]
            running = Running(command(whole.recipe, store))
            reached = running.follow(f"✓ {whole.stages[-1]}" if target == "publish" else target)
            wait = self.random.uniform(0, max(0.2, whole.seconds[target]))
            if reached or target == "publish":
                time.sleep(wait)
            running.kill()
            if running.process.returncode != -signal.SIGKILL:
                break  # it was quicker
            done += 1
            self.tally.kills[kind_of(target)] += 1
            self.say(f"killed {wait:5.2f} s into {target}")
            todo = todo[todo.index(target) :] if target != "start" else todo[1:]
            if self.random.random() < 0.2:
                self.damage(store)
        self.finish(store, whole)
        shutil.rmtree(store)
        return done

    def damage(self, store: Path) -> None:
        """Damages one object as a bad disk or a careless hand would."""
        keys = [key for key in Store(store).finished() if not any(name.startswith(key) for name in self.kept)]
        if not keys:
            return
        path = Store(store).objects / self.random.choice(keys)
        harm = self.random.choice(["", "[]", "{}", '{"key": 1}', None])
        file = path / MANIFEST
        if harm is None:
            file = self.random.choice([each for each in sorted(path.rglob("*")) if each.is_file()])
        os.chmod(file, 0o644)
        if harm is None:
            content = bytearray(file.read_bytes())
            content[self.random.randrange(len(content))] ^= 1
            file.write_bytes(content)
        else:
            file.write_text(harm)
        self.tally.damaged += 1
        self.say(f"damaged {file.relative_to(store)}")

    def kill_gc(self, whole: Undisturbed, finished: Path, kills: int) -> None:
        """Kills gc while it removes a version's objects, then lets it end."""
        for _ in range(kills):
            store = self.folder / f"gc-{self.number}"
            self.number += 1
            shutil.copytree(finished, store, symlinks=True)
            shutil.rmtree(store / whole.recipe["name"])
            child = os.fork()
            if not child:
                collect(Store(store))
                os._exit(0)
            time.sleep(self.random.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            self.tally.gc_kills += os.WIFSIGNALED(status)
            collect(Store(store))
            self.sound(store, "after a killed gc")
            left = set(Store(store).finished()) - {name.split("/")[0] for name in self.kept}
            if left:
                self.fault(f"gc left {sorted(left)}")
            shutil.rmtree(store)

    # full disks

    def fill(self, whole: Undisturbed, room: Room, kills: int = 0) -> None:
        """Runs a recipe on a disk that is too small, then on one that is large enough, there killed `kills` times."""
        share = self.random.uniform(0.05, 0.98)
        size = int(self.kept_bytes + share * (whole.bytes - self.kept_bytes))
        with room(self.folder / f"disk-{self.number}", size) as (folder, grow, before):
            store = self.fresh(folder)
            running = Running(command(whole.recipe, store), preexec_fn=before)
            code = running.end()
            self.tally.full[kind_of(running.current)] += 1
            self.say(f"disk full at {share:.0%} of {whole.recipe['name']}, in {running.current}")
            errors = [line for line in running.lines if line.startswith("lighten: ")]
            if code != 1 or len(errors) != 1 or "free some space" not in errors[0]:
                self.fault(f"full disk: exit code {code}, said {running.lines[-3:]}")
            if any("Traceback" in line for line in running.lines):
                self.fault("full disk: a traceback")
            grow()
            self.kill_on_the_way(whole, kills, store, running.current)

    # side by side

    def together(self, whole: Undisturbed) -> None:
        """Runs a recipe and a part of it at once, with gc all the while."""
        store = self.fresh()
        line = command(whole.recipe, store)
        first = next(iter(whole.recipe["variants"]))
        both = [Running(line), Running([*line, "--only", first])]
        for each in both:
            assert each.process.stderr
            os.set_blocking(each.process.stderr.fileno(), False)
        begin = time.monotonic()
        while any(each.process.poll() is None for each in both) and time.monotonic() < begin + PATIENCE:
            found = subprocess.run(lighten("gc", "--artifacts", str(store)), capture_output=True, text=True)
            self.tally.gc_beside += 1
            if found.returncode:
                self.fault(f"gc beside runs: {found.stderr}")
        for each in both:
            if each.process.wait(PATIENCE):
                assert each.process.stderr
                self.fault(f"two at once: exit code {each.process.returncode}: {each.process.stderr.read()}")
            each.kill()
        self.tally.together += 1
        self.say(f"two runs and {self.tally.gc_beside} times gc so far")
        versions = Store(store).versions(whole.recipe["name"])
        if len(versions) != 2:
            self.fault(f"two at once published {[path.name for path in versions]}")
        self.finish(store, whole, versions=2)
        shutil.rmtree(store)

    def read_only(self, whole: Undisturbed, finished: Path, room: Room) -> None:
        """Reads and writes a store that cannot be written."""
        with room(self.folder / f"read-only-{self.number}", 3 * whole.bytes) as (folder, _, _):
            store = folder / "store"
            shutil.copytree(finished, store, symlinks=True)
            before = contents(store)
            name = str(whole.recipe["name"])
            readers = [["ls"], ["report", name], ["report", name, "--format", "json"], ["verify"], ["gc", "--dry-run"]]
            readers += [["plan", str(file)] for file in self.folder.glob(f"*-{name}.yaml")][:1]
            other = command({**whole.recipe, "name": "other"}, self.folder / "other")[3:5]
            with closed(folder):
                for line, right in [*((each, 0) for each in readers), (["gc"], 2), (other, 2)]:
                    found = subprocess.run(
                        lighten(*line, "--artifacts", str(store)), capture_output=True, text=True, timeout=PATIENCE
                    )
                    self.tally.read_only += 1
                    if found.returncode != right or "Traceback" in found.stderr:
                        self.fault(f"read-only: {line[0]}: exit code {found.returncode}: {found.stderr[-500:]}")
                    if right and found.stderr.count("lighten: ") != 1:
                        self.fault(f"read-only: {line[0]} says {found.stderr!r}")
            if contents(store) != before:
                self.fault("read-only: the store changed")
        self.say("read-only: done")

    # what must hold

    def finish(self, store: Path, whole: Undisturbed, versions: int = 1) -> None:
        """Runs to the end; notes whatever is not as in an undisturbed run."""
        name = whole.recipe["name"]
        running = Running(command(whole.recipe, store))
        if code := running.end():
            self.fault(f"{name} after a disturbance: exit code {code}: {running.lines[-5:]}")
            return
        collect(Store(store))
        found = contents(store, {key.split("/")[0] for key in whole.contents})
        differ = sorted(file for file in whole.contents if found.get(file) != whole.contents[file])
        if differ or found.keys() != whole.contents.keys():
            more = sorted(found.keys() - whole.contents.keys())
            self.fault(f"{name}: other bytes than undisturbed: {differ[:5]} {more[:5]}")
        told = [published(version) for version in Store(store).versions(name)]
        if len(told) != versions or whole.results not in told:
            self.fault(f"{name}: {len(told)} versions, or other results than undisturbed")
        self.sound(store, f"{name} after a disturbance")

    def sound(self, store: Path, when: str) -> None:
        """Notes what is damaged, lost, or left lying about after gc."""
        self.tally.checks += 1
        it = Store(store)
        if damaged := [each for each in check(it) if each.damage]:
            self.fault(f"{when}: damaged: {damaged[:3]}")
        if contents(store, {name.split("/")[0] for name in self.kept}) != self.kept:
            self.fault(f"{when}: what was published before is lost")
        for version in it.versions():
            if version.parent.joinpath("latest").resolve().name != it.versions(version.parent.name)[-1].name:
                self.fault(f"{when}: latest does not lead to the newest version")
        if left := leftovers(it):
            self.fault(f"{when}: left behind: {left[:5]}")


def leftovers(store: Store) -> list[str]:
    """Returns what gc should have removed."""
    referenced = store.referenced()
    left = [path for path in store.objects.iterdir() if path.name not in referenced]
    left += [path for path in (store.root / "costs").iterdir() if path.stem not in referenced]
    for name in ("unfinished", "leases"):
        left += [*(store.root / name).iterdir()] if (store.root / name).is_dir() else []
    left += [path for path in (store.root / "locks").iterdir() if path.name != "gate.lock"]
    for version in store.versions():
        left += [path for path in version.parent.iterdir() if path.name.startswith(".")]
        left += [path for path in version.rglob(".*") if path.is_file()]
    return sorted(str(path.relative_to(store.root)) for path in left)


Room = Callable[[Path, int], contextlib.AbstractContextManager[tuple[Path, Callable[[], None], Callable[[], None]]]]
"""Makes a place with room for so many bytes; yields it, what gives it more room, and what a child calls first."""


@contextlib.contextmanager
def small_disk(folder: Path, room: int) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A tmpfs of so many bytes; needs the right to mount, if only in a namespace of one's own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)], check=True)
    try:
        grow = ["mount", "-o", "remount,size=1g", str(folder)]
        yield folder, lambda: subprocess.run(grow, check=True) and None, lambda: None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def short_files(folder: Path, room: int) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A directory in which a child may write no file longer than a part of the room, for those who may not mount."""
    folder.mkdir()
    limit = max(1, room // 8)
    yield folder, lambda: None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@contextlib.contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Makes a directory read-only: a file system of its own as a whole, another one by its permissions."""
    if folder.is_mount():
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        return
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")] if not path.is_symlink()}
    for path in modes:
        path.chmod(modes[path] & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
