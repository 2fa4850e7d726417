"""The sweep, GPTQ and the sensitivities of a budget on the real model, at an older commit and now, in turn.

    python benchmarks/engine.py --before COMMIT [--repeats 2] [--samples 64] [--length 512]

Writes benchmarks/results/engine.json. Both run in this environment, each from its own sources. Every stage has a
process of its own: its peak is that process's resident memory, pages that it shares included (`VmHWM`). CPU seconds are
those of a command's processes together. Equal outputs are equal byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.store.store import Store, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "engine.json"
MODEL = "demo:smollm2-135m"
COMMANDS = {"gptq": ("--bits", "4"), "budget": ("--budget", "bits=4.25")}
"""The second finds the sweep of the first in the store."""
OUTPUTS = {
    "sweep": ("layer-*.safetensors",),
    "sensitivity": ("sensitivity.json", "head.safetensors"),
    "quantize": ("*.safetensors",),
}
"""Files of a stage that have numbers. The others may tell more than before."""


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Yields a checkout of a commit."""
    place = folder / "before"
    git = ("git", "-C", str(HERE.parent), "worktree")
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def digests(store: Store) -> dict[str, str]:
    """Returns one digest of the outputs of all stages of a kind."""
    found: dict[str, list[str]] = {kind: [] for kind in OUTPUTS}
    for artifact in filter(None, map(store.find, store.finished())):
        kind = artifact.manifest["kind"]
        for file in (file for pattern in OUTPUTS.get(kind, ()) for file in artifact.path.glob(pattern)):
            found[kind].append(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return {kind: hashlib.sha256("\n".join(sorted(each)).encode()).hexdigest() for kind, each in found.items()}


def measure(sources: Path, folder: Path, calibration: list[str]) -> dict[str, Any]:
    """Runs both commands with the code of `sources`; returns their costs and those of their stages."""
    env = {**os.environ, "PYTHONPATH": str(sources.resolve())}
    store = Store(folder / "artifacts")
    stages: dict[str, dict[str, float]] = {}
    commands: dict[str, dict[str, float]] = {}
    for name, flags in COMMANDS.items():
        known = {json.dumps(cost) for cost in store.costs()}
        command = [sys.executable, "-P", "-m", "lighten", "quantize", MODEL, *flags, "--group-size", "64", *calibration]
        command += ["-o", str(folder / name), "--artifacts", str(store.root)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, check=True, env=env, cwd=folder, stdout=subprocess.DEVNULL)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        commands[name] = {"seconds": seconds, "cpu_seconds": used}
        for cost in store.costs():
            if json.dumps(cost) not in known:
                what = cost["what"].partition(" ")[0]
                stages[f"{what}, {name}" if what == "quantize" else what] = {
                    part: cost[part] for part in ("seconds", "peak_bytes")
                }
    return {"commands": commands, "stages": stages, "digests": digests(store)}


def summary(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the median of each cost, by command or stage."""
    return {
        name: {part: statistics.median(each[kind][name][part] for each in rounds) for part in parts}
        for kind in ("commands", "stages")
        for name, parts in rounds[0][kind].items()
    }


def main() -> None:
    """Runs before and now in turn, and writes what each took and whether the outputs are the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    asked = parser.parse_args()
    settings = ["--samples", str(asked.samples), "--length", str(asked.length)]
    rounds: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder, checkout(asked.before, Path(folder)) as before:
        sources = {"before": before, "now": HERE.parent}
        for repeat in range(asked.repeats):
            for name in ("before", "now") if repeat % 2 == 0 else ("now", "before"):
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    rounds[name].append(measure(sources[name], Path(own), settings))
    digest = {kind: {each["digests"][kind] for both in rounds.values() for each in both} for kind in OUTPUTS}
    flags = ["--before", asked.before, "--repeats", str(asked.repeats), *settings]
    found = {
        "command": " ".join(["python benchmarks/engine.py", *flags]),
        "machine": machine.fingerprint(),
        "rows": {name: summary(each) for name, each in rounds.items()},
        "equal": {kind: len(each) == 1 for kind, each in digest.items()},
        "rounds": rounds,
    }
    write_json(RESULTS, found)
    print(json.dumps({name: found[name] for name in ("rows", "equal")}, indent=1))


if __name__ == "__main__":
    main()
