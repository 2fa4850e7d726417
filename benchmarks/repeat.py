"""Whether a speed is the same when it is measured again: two measurements of each artifact, by turns.

    python benchmarks/repeat.py [MODEL ...] [--turns 2]

MODEL is a directory or a .gguf file; without any, the demo model as it is and as Q8_0. Writes
benchmarks/results/repeat.json. On a machine that does nothing else; exit code 1 if two are more than 5 % apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.evaluate.speed.settings import Speed
from lighten.numerics.steady import REPEATED, apart
from lighten.pipeline.recipe import parse
from lighten.pipeline.run import run
from lighten.pipeline.verbs import measure
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "repeat.json"
DEMO: dict[str, Any] = {
    "name": "repeat",
    "model": "demo:smollm2-135m",
    "variants": {"gguf-q8_0": [{"export": {"format": "gguf", "type": "Q8_0"}}]},
}


def demo(artifacts: Path) -> dict[str, str]:
    """Returns the demo model and its Q8_0, made if they are not there."""
    variants = run(parse(DEMO), artifacts=artifacts) / "variants"
    return {name: str((variants / name).resolve()) for name in ("baseline", "gguf-q8_0")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    models = {Path(each).name: each for each in asked.models} or demo(asked.artifacts)
    settings = Speed(generate=asked.generate, repeats=asked.repeats)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for _ in range(asked.turns):
        for name, path in models.items():
            (row,) = measure([path], speed=settings)["variants"]
            if row["status"] == "failed":
                raise SystemExit(f"{name}: {row['error']}")
            found[name] += row["speed"]
            print(name, f"{row['speed'][0]['decode_tok_s']:.1f} tok/s", flush=True)
    rows = []
    for name, runs in found.items():
        speeds = [each["decode_tok_s"] for each in runs]
        spreads = [each["spread"] for each in runs]
        rows.append({"name": name, "decode_tok_s": speeds, "apart": apart(min(speeds), max(speeds)), "spread": spreads})
    head = {"command": "python benchmarks/repeat.py", "machine": machine.fingerprint(), "limit": REPEATED}
    write_json(asked.out, {**head, "settings": settings.model_dump(mode="json"), "rows": rows})
    beyond = [f"{each['name']}: {each['apart']:.1%} apart" for each in rows if each["apart"] > REPEATED]
    print(*(beyond or [f"none is more than {REPEATED:.0%} apart"]), sep="\n")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
