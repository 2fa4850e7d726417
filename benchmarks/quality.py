"""What each method costs in perplexity, and what a budget buys at the size of 4 bits and of Q4_K_M.

    python benchmarks/quality.py --calibration wikitext2_valid.txt --test wikitext2_test.txt

Runs one recipe twice: on the demo model, and on the same function moved off its grid. The demo's weights were 4-bit
ones once (Q4_1), which flatters a GGUF budget that may choose that type; random scales that move between neighbouring
matrices of a layer leave the function as it is and the weights on no grid.

Writes benchmarks/results/quality.json; the objects stay in --artifacts, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from off_grid import moved_off_grid

import lighten
from lighten.evaluate import machine
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "quality.json"
GROUPS = {"group_size": 64}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rtn asymmetric": [{"quantize": {"method": "rtn", "sym": False, **GROUPS}}],
    "awq": [{"quantize": {"method": "awq", **GROUPS}}],
    "gptq": [{"quantize": {"method": "gptq", **GROUPS}}],
    "gptq budget 4.25": [{"quantize": {"method": "gptq", "budget": {"bits": 4.25}, **GROUPS}}],
    "q4_k_m": [{"export": {"format": "gguf", "type": "Q4_K_M", "imatrix": True}}],
}
"""4 bits and groups of 64 where nothing else is said; the GGUF budget is added once the size of Q4_K_M is known."""


def measure(name: str, model: str, variants: dict[str, Any], asked: argparse.Namespace) -> Path:
    """Runs a recipe; returns the directory of its version."""
    recipe = asked.artifacts / f"{name}.yaml"
    perplexity = {"data": asked.test, "samples": asked.test_samples, "length": 512}
    calibration = {"data": asked.calibration, "samples": asked.samples, "length": 512}
    content = {"name": name, "model": model, "calibration": calibration, "variants": variants}
    recipe.write_text(json.dumps({**content, "evaluate": {"perplexity": perplexity}}), encoding="utf-8")
    return lighten.run(str(recipe), artifacts=asked.artifacts)


def table(
    name: str, model: str, variants: dict[str, Any], asked: argparse.Namespace
) -> tuple[list[dict[str, Any]], Path]:
    """Returns a row for each variant, and the directory of the source."""
    variants = {each.replace(" ", "-"): steps for each, steps in variants.items()}
    first = json.loads((measure(name, model, variants, asked) / "results.json").read_text())
    (size,) = (row["size_bytes"] for row in first["variants"] if row["name"] == "q4_k_m")
    budget = {"export": {"format": "gguf", "budget": {"size": size}}}
    version = measure(name, model, {**variants, "gguf-budget": [budget]}, asked)
    rows = []
    for row in json.loads((version / "results.json").read_text())["variants"]:
        print(name, row["name"], row["status"], row["error"], (row["perplexity"] or {}).get("value"), flush=True)
        kept = ("name", "status", "error", "format", "size_bytes", "bits_per_weight", "runtime", "perplexity")
        extra = {"divergence": row.get("divergence"), "change": (row.get("delta") or {}).get("perplexity")}
        if row["perplexity"]:  # the name of the text, not where it lies here
            row["perplexity"]["protocol"]["data"] = Path(asked.test).name
        rows.append({"model": name, **{key: row.get(key) for key in kept}, **extra})
    return rows, version / "variants" / "baseline"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--calibration", default="builtin", help="text file to calibrate on")
    parser.add_argument("--test", default="builtin", help="text file to measure perplexity on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts") / "quality")
    asked = parser.parse_args()
    asked.artifacts.mkdir(parents=True, exist_ok=True)
    rows, source = table("as-it-is", asked.model, VARIANTS, asked)
    moved = moved_off_grid(source.resolve(), asked.artifacts / "off-grid")
    budgets = {name: VARIANTS[name] for name in ("gptq", "gptq budget 4.25", "q4_k_m")}
    rows += table("off-grid", str(moved), budgets, asked)[0]
    settings = {"model": asked.model, "samples": asked.samples, "test_samples": asked.test_samples, "length": 512}
    texts = {"calibration": Path(asked.calibration).name, "test": Path(asked.test).name}
    flags = " ".join(f"--{key} {value}" for key, value in texts.items())
    head = {"command": f"python benchmarks/quality.py {flags}", "machine": machine.fingerprint()}
    write_json(RESULTS, {**head, "settings": {**settings, **texts}, "rows": rows})


if __name__ == "__main__":
    main()
