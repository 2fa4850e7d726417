"""What the peers' scripts share. Each runs in its peer's own environment: `python with_PEER.py TASK.json`.

A task names model, ids (a file of token ids, `[samples][length]`), out, method, bits and group_size. The answer is
the last line of the output, as JSON: the versions, and the first line of the error if there was one. Without a method
a script only imports its peer, so that the first run is not charged for compiling Python files. Nothing here is
imported from lighten.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COMMON = ("torch", "transformers", "compressed-tensors", "accelerate", "datasets", "numpy")


def ids(task: dict[str, Any]) -> list[list[int]]:
    """Returns the token ids of a task."""
    rows: list[list[int]] = json.loads(Path(task["ids"]).read_text())
    return rows


def main(work: Callable[[dict[str, Any]], dict[str, Any] | None], *packages: str) -> None:
    """Does the task named on the command line and answers."""
    task = json.loads(Path(sys.argv[1]).read_text())
    answer: dict[str, Any] = {"versions": _versions((*packages, *COMMON))}
    try:
        answer |= work(task) or {}
    except Exception as error:  # whatever a peer refuses with is what the benchmark records
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        answer["error"] = f"{type(error).__name__}: {lines[0]}"
    print("\n" + json.dumps(answer), flush=True)
    sys.exit(1 if "error" in answer else 0)


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
