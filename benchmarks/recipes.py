"""What the ready recipes that train give: perplexity of every variant, its size, and what the whole recipe took.

    python benchmarks/recipes.py [qad-int4 slim low-bits sparse-2-4]

Runs them (or finds them finished in --artifacts) and writes benchmarks/results/recipes.json. Times are of the stages,
as they took when they were built.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lighten
from lighten.cli.progress import watching
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results"
NAMES = ("qad-int4", "slim", "low-bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    asked = parser.parse_args()
    file = RESULTS / "recipes.json"
    found = {row["recipe"]: row for row in json.loads(file.read_text())["rows"]} if file.is_file() else {}
    for name in asked.names:
        with watching(quiet=False) as watcher:
            folder = lighten.run(name, artifacts=asked.artifacts, watcher=watcher)
        results = json.loads((folder / "results.json").read_text())
        kept = ("name", "status", "error", "format", "runtime", "params", "size_bytes", "bits_per_weight", "perplexity")
        found[name] = {
            "recipe": name,
            "created": results["created"],
            "machine": results["machine"],
            "source": results["source"]["model"],
            "seconds": sum(stage["actual"]["seconds"] for stage in results["stages"] if stage["actual"]),
            "peak_bytes": max(stage["actual"]["peak_bytes"] for stage in results["stages"] if stage["actual"]),
            "variants": [{key: variant.get(key) for key in kept} for variant in results["variants"]],
        }
    rows = [found[name] for name in sorted(found)]
    write_json(file, {"command": "python benchmarks/recipes.py", "rows": rows})


if __name__ == "__main__":
    main()
