"""The ladder, rung by rung, beside the published one that it mirrors.

    python benchmarks/ladder.py [ladder | ladder-gpu | RECIPE.yaml]

Runs the recipe (or finds it finished in --artifacts) on a machine that does nothing else, writes
benchmarks/results/ladder.json and prints both. ladder-gpu wants a model first:
`python benchmarks/shaped.py llama-3.1-8b-random`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lighten
from lighten.cli.progress import watching
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "ladder.json"
SOURCE = "the ladder as it is commonly shown: Llama-3.1-8B on a GeForce RTX 3090, Q4_K_M on a CPU; not measured here"
PUBLISHED: dict[str, tuple[str, float | None, float]] = {
    "baseline": ("bf16", 16.0, 38),
    "flash": ("+ flash attention", None, 52),
    "compile": ("+ torch.compile", None, 68),
    "int8": ("int8", 8.5, 35),
    "nf4": ("NF4", 4.9, 42),
    "gptq": ("GPTQ", 4.8, 55),
    "awq": ("AWQ", 4.7, 52),
    "q4_k_m": ("Q4_K_M on a CPU", None, 18),
}
"""Rung, GB of memory and tokens per second."""
STANDS_FOR = {"sdpa": "flash"}


def rung(variant: dict[str, Any]) -> dict[str, Any]:
    """Returns what was measured of a variant."""
    speed = (variant.get("speed") or [{}])[0]
    memory = variant.get("memory") or {}
    kept = ("decode_tok_s", "prefill_tok_s", "spread", "attention", "compile", "cache", "batch", "prompt", "generate")
    return {
        **{key: variant.get(key) for key in ("name", "status", "error", "format", "runtime", "device", "size_bytes")},
        **{key: speed.get(key) for key in kept},
        "peak_bytes": memory.get("peak_vram_bytes") or memory.get("peak_rss_bytes"),
        "perplexity": (variant.get("perplexity") or {}).get("value"),
        "roofline": variant.get("roofline"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="ladder")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with watching(quiet=False) as watcher:
        folder = lighten.run(asked.recipe, artifacts=asked.artifacts, watcher=watcher)
    results = json.loads((folder / "results.json").read_text())
    published = [
        {"rung": name, "name": label, "memory_gb": memory, "decode_tok_s": speed}
        for name, (label, memory, speed) in PUBLISHED.items()
    ]
    found = {
        "command": f"python benchmarks/ladder.py {asked.recipe}",
        "created": results["created"],
        "machine": results["machine"],
        "model": results["source"]["model"],
        "rows": [rung(variant) for variant in results["variants"]],
        "stands_for": STANDS_FOR,
        "published": {"source": SOURCE, "rows": published},
    }
    write_json(asked.out, found)
    from serving import ladder

    print(ladder(found))


if __name__ == "__main__":
    main()
