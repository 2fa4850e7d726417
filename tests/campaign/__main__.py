"""Disturbs lighten for half an hour, checks after each disturbance that nothing was lost, and writes the figures.

    python -m tests.campaign [--minutes 30] [--kills 100] [--seed 0] [--out benchmarks/results/campaign.json]

What is disturbed: recipes with every kind of step over a tiny random model. How: `kill -9` of a run and all it started,
at random moments; disks that fill up; objects that are damaged; two runs and gc at once; a read-only store. After each
the same command goes on to the end, and every object, result and version has to be what a run in peace leaves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.store.store import write_json

from .disturb import Campaign, Room, Running, Tally, Undisturbed, short_files, small_disk, undisturbed
from .subject import command, earlier, exported, make_model, steps, timed

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "campaign.json"
INSIDE = "LIGHTEN_CAMPAIGN_INSIDE"
"""Set in a campaign that has been started again in a namespace of its own."""


def disk(*, again: bool = True) -> tuple[str, Room]:
    """Returns how a full disk is made here, and what makes it: by mounting, or else by limits of files.

    With `again` the campaign is started again where it may mount, if there it may.
    """
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
            how = "a tmpfs in a namespace of the user" if os.environ.get(INSIDE) else "a tmpfs mounted by root"
            return how, small_disk
    again = again and not os.environ.get(INSIDE)
    if again and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "tests.campaign", *sys.argv[1:]])
    return "a limit on the length of files (RLIMIT_FSIZE)", short_files


def prepare(folder: Path, recipes: list[Any]) -> tuple[Path, list[Undisturbed]]:
    """Returns a store with a version published before, and what each recipe leaves in peace."""
    model = make_model(folder / "model")
    before = folder / "before"
    running = Running(command(earlier(make_model(folder / "other-model", seed=2)), before))
    if running.end():
        raise SystemExit("\n".join(running.lines))
    found = []
    for recipe in recipes:
        store = folder / f"peace-{len(found)}"
        shutil.copytree(before, store, symlinks=True)
        found.append(undisturbed(recipe(model), store))
    return before, found


def campaign(asked: argparse.Namespace, folder: Path, how: str, room: Room) -> Tally:
    """Disturbs until the time is over and the kills are done; writes the figures after each turn."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", flush=True)

    say(f"seed {asked.seed}; disks are {how}")
    before, found = prepare(folder, [steps, exported, timed])
    wide, others = found[0], found[1:]
    for whole in found:
        say(f"{whole.recipe['name']} in peace: {len(whole.stages)} stages, {len(whole.contents)} files")
    it = Campaign(folder, asked.seed, before, say)
    it.read_only(wide, folder / "peace-0", room)
    it.kill_gc(wide, folder / "peace-0", asked.gc_kills)
    for turn in count():
        it.kill_on_the_way(others[turn // 4 % 2] if turn % 4 == 2 else wide, asked.run_kills)
        if turn % 2 == 1:
            it.fill(found[turn // 2 % 2], room)
        if turn % 6 == 0:
            it.together(wide)
        minutes = (time.monotonic() - begin) / 60
        say(f"{it.killed} kills, {len(it.tally.faults)} faults")
        write(asked, how, minutes, found, it.tally)
        if minutes > asked.minutes and (it.killed >= asked.kills or minutes > 2 * asked.minutes):
            break
    return it.tally


def write(asked: argparse.Namespace, how: str, minutes: float, found: list[Undisturbed], tally: Tally) -> None:
    """Writes the figures."""
    value = {
        "command": f"python -m tests.campaign --minutes {asked.minutes:g} --kills {asked.kills} "
        f"--run-kills {asked.run_kills} --gc-kills {asked.gc_kills} --seed {asked.seed}",
        "machine": machine.fingerprint(),
        "minutes": round(minutes, 1),
        "disk": how,
        "recipes": [
            {"name": each.recipe["name"], "stages": each.stages, "files": len(each.contents)} for each in found
        ],
        **{name: dict(each) if isinstance(each, Counter) else each for name, each in vars(tally).items()},
    }
    write_json(asked.out, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=100, help="at least so many, in at most twice the time")
    parser.add_argument("--run-kills", type=int, default=14, help="kills on the way of one recipe to its end")
    parser.add_argument("--gc-kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    how, room = disk()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        tally = campaign(asked, Path(folder), how, room)
    print(f"{sum(tally.kills.values())} kills of runs, {tally.gc_kills} of gc, {sum(tally.full.values())} full disks,")
    print(f"{tally.together} times two runs at once; {tally.checks} checks, {len(tally.faults)} faults: {asked.out}")
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
