"""Requests that keep arriving, speculative decoding, the machine's roof and the price of tokens, for three artifacts.

    python benchmarks/served.py [--artifacts DIR]

Runs the recipe `serving` on a machine that does nothing else, and writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lighten
from lighten.cli.progress import watching
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "serving.json"
KEPT = ("name", "status", "error", "runtime", "load", "speculative", "roofline", "cost", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with watching(quiet=False) as watcher:
        folder = lighten.run("serving", artifacts=asked.artifacts, watcher=watcher)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = {
        "command": "python benchmarks/served.py",
        "created": results["created"],
        "machine": results["machine"],
        "model": results["source"]["model"],
        "rows": [{key: variant.get(key) for key in KEPT} for variant in results["variants"]],
    }
    write_json(asked.out, found)


if __name__ == "__main__":
    main()
