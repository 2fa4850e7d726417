"""What zeros, missing channels, heads and layers cost in perplexity, and what the repair gives back.

    python benchmarks/sparsity.py --calibration wikitext2_valid.txt --test wikitext2_test.txt

Writes benchmarks/results/sparsity.json; the objects stay in --artifacts, so that a run that was stopped goes on. The
published figures beside ours are of Llama-2-7B, WikiText-2, 50 % of the weights (Sun et al., 2024).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import lighten
from lighten.evaluate import machine
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "sparsity.json"
PUBLISHED = {"dense": 5.12, "magnitude": 14.89, "wanda": 6.42, "sparsegpt": 6.51}
ZEROS = ("magnitude", "wanda", "sparsegpt")
SHRUNK: dict[str, dict[str, Any]] = {
    "mlp": {"what": "mlp", "ratio": 0.2},
    "heads": {"what": "heads", "count": 1},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    **{f"{method}-50": [{"prune": {"method": method, "sparsity": 0.5}}] for method in ZEROS},
    "magnitude-global-50": [{"prune": {"method": "magnitude", "sparsity": 0.5, "scope": "global"}}],
    **{f"{method}-2of4": [{"prune": {"method": method, "pattern": "2:4"}}] for method in ZEROS},
    **{name: [{"prune": settings}] for name, settings in SHRUNK.items()},
    **{f"{name}-unrepaired": [{"prune": {**settings, "repair": False}}] for name, settings in SHRUNK.items()},
    **{f"{name}-energy": [{"prune": {**settings, "score": "energy"}}] for name, settings in SHRUNK.items()},
    **{
        f"{name}-energy-unrepaired": [{"prune": {**settings, "score": "energy", "repair": False}}]
        for name, settings in SHRUNK.items()
    },
    "heads-taylor": [{"prune": {**SHRUNK["heads"], "score": "taylor"}}],
    "layers": [{"prune": {"what": "layers", "count": 2}}],
    "layers-free": [{"prune": {"what": "layers", "count": 2, "contiguous": False}}],
    "target": [{"prune": {"target": {"ratio": 0.1}}}],
}
EXPORTED = ("mlp", "heads", "layers")
VARIANTS |= {f"{name}-f16": [*VARIANTS[name], {"export": {"format": "gguf", "type": "F16"}}] for name in EXPORTED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--calibration", default="builtin", help="text file to calibrate on")
    parser.add_argument("--test", default="builtin", help="text file to measure perplexity on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--speed", action="store_true", help="also measure memory and speed: on a quiet machine")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts") / "sparsity")
    asked = parser.parse_args()
    asked.artifacts.mkdir(parents=True, exist_ok=True)
    recipe = asked.artifacts / "sparsity.yaml"
    evaluate: dict[str, Any] = {"perplexity": {"data": asked.test, "samples": asked.test_samples, "length": 512}}
    variants = VARIANTS
    if asked.speed:
        evaluate = {"speed": {"prompt": 128, "generate": 64, "batch": [1]}}
        wanted = (*EXPORTED, *(f"{name}-f16" for name in EXPORTED))
        variants = {name: VARIANTS[name] for name in wanted}
        variants["f16"] = [{"export": {"format": "gguf", "type": "F16"}}]
    name = "sparsity-speed" if asked.speed else "sparsity"
    content = {
        "name": name,
        "model": asked.model,
        "calibration": {"data": asked.calibration, "samples": asked.samples, "length": 512},
        "variants": variants,
        "evaluate": evaluate,
    }
    recipe.write_text(json.dumps(content), encoding="utf-8")
    version = lighten.run(str(recipe), artifacts=asked.artifacts)
    found = json.loads((version / "results.json").read_text())
    rows = []
    for row in found["variants"]:
        if row.get("perplexity"):  # the name of the text, not where it lies here
            row["perplexity"]["protocol"]["data"] = Path(asked.test).name
        kept = ("name", "status", "error", "params", "size_bytes", "runtime", "perplexity", "speed", "memory", "facts")
        rows.append({key: row.get(key) for key in kept})
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    texts = {"calibration": Path(asked.calibration).name, "test": Path(asked.test).name}
    flags = " ".join(f"--{key} {value}" for key, value in texts.items())
    part = {
        "command": f"python benchmarks/sparsity.py {flags}{' --speed' if asked.speed else ''}",
        "machine": machine.fingerprint(),
        "settings": {"model": asked.model, "samples": asked.samples, "test_samples": asked.test_samples, **texts},
        "rows": rows,
    }
    write_json(RESULTS, {**results, "speed" if asked.speed else "perplexity": part})
    if not asked.speed:
        show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    found = {row["name"]: row["perplexity"]["value"] for row in rows if row["perplexity"]}
    dense = found["baseline"]
    print(f"dense {dense:.2f} (Llama-2-7B: {PUBLISHED['dense']})")
    for method in ZEROS:
        half, pattern = found[f"{method}-50"], found[f"{method}-2of4"]
        print(
            f"{method}: 50 % {half:.2f} ({math.log(half / dense):+.3f} nats), 2:4 {pattern:.2f} "
            f"({math.log(pattern / dense):+.3f}); Llama-2-7B at 50 %: {PUBLISHED[method]} "
            f"({math.log(PUBLISHED[method] / PUBLISHED['dense']):+.3f})"
        )
    for name in SHRUNK:
        for score in ("", "-energy"):
            without, with_ = (math.log(found[f"{name}{score}{end}"] / dense) for end in ("-unrepaired", ""))
            print(f"{name}{score}: {without:+.3f} nats, repaired {with_:+.3f}: {1 - with_ / without:.0%} given back")
    for name in EXPORTED:
        print(f"{name}: {found[name]:.4f}, as GGUF {found[f'{name}-f16']:.4f}")
    for name in ("heads-taylor", "layers", "layers-free", "target", "magnitude-global-50"):
        print(f"{name}: {found[name]:.2f}")


if __name__ == "__main__":
    main()
