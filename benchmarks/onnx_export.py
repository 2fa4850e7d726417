"""What ONNX export costs in perplexity and bytes, and decoding speed beside what the builder gives on its own.

    python benchmarks/onnx_export.py --calibration wikitext2_valid.txt --test wikitext2_test.txt

Writes benchmarks/results/onnx.json; the objects stay in --artifacts, so that a run that was stopped goes on. The graphs
that the builder makes by itself, with its own defaults, are made and decoded beside lighten's, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from turns import PROMPT, STEPS, TURNS, decode_in_turn

import lighten
from lighten.evaluate import machine
from lighten.pipeline.verbs import measure
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "onnx.json"
GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "fp32": [{"export": {"format": "onnx", "precision": "fp32"}}],
    "fp16": [{"export": {"format": "onnx", "precision": "fp16"}}],
    "int8": [{"export": {"format": "onnx", "precision": "int8"}}],
    "int4": [{"export": {"format": "onnx", "precision": "int4"}}],
    "int4-all": [{"export": {"format": "onnx", "precision": "int4", "embedding": "int4"}}],
    "gptq": [GPTQ],
    "gptq-onnx": [GPTQ, {"export": {"format": "onnx"}}],
    "gptq-onnx-all": [GPTQ, {"export": {"format": "onnx", "embedding": "int4"}}],
    "gptq-onnx-float": [GPTQ, {"export": {"format": "onnx", "embedding": "float"}}],
}
ALONE: dict[str, tuple[str, dict[str, str]]] = {
    "builder-int4": ("baseline", {}),
    "builder-int4-last": ("baseline", {"algo_config": "rtn_last"}),
    "builder-gptq": ("gptq", {}),
}
"""What the builder makes without lighten: from which variant, with which options. `rtn_last`: the head in 8 bits."""
COMPARED = [
    ("int4-all", "builder-int4"),
    ("int4", "builder-int4-last"),
    ("int4", "builder-int4"),
    ("gptq-onnx-all", "builder-gptq"),
    ("gptq-onnx", "builder-gptq"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--calibration", default="builtin", help="text file to calibrate on")
    parser.add_argument("--test", default="builtin", help="text file to measure perplexity on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts") / "onnx")
    asked = parser.parse_args()
    asked.artifacts.mkdir(parents=True, exist_ok=True)
    perplexity = {"data": asked.test, "samples": asked.test_samples, "length": 512}
    content = {
        "name": "onnx",
        "model": asked.model,
        "calibration": {"data": asked.calibration, "samples": asked.samples, "length": 512},
        "variants": VARIANTS,
        "evaluate": {"perplexity": perplexity},
    }
    recipe = asked.artifacts / "onnx.yaml"
    recipe.write_text(json.dumps(content), encoding="utf-8")
    version = lighten.run(str(recipe), artifacts=asked.artifacts)
    found = json.loads((version / "results.json").read_text())
    made = version / "variants"
    rows = [_row(row, asked.test) for row in found["variants"]]
    with tempfile.TemporaryDirectory(dir=asked.artifacts) as folder:
        for name, (source, options) in ALONE.items():
            build_alone(made / source, Path(folder) / name, options)
            row = measure([str(Path(folder) / name)], perplexity=_perplexity(perplexity))["variants"][0]
            rows.append({**_row(row, asked.test), "name": name})
        speed = [
            {"name": ours, "peer": theirs, **decode_in_turn(made / ours, Path(folder) / theirs)}
            for ours, theirs in COMPARED
        ]
    texts = {"calibration": Path(asked.calibration).name, "test": Path(asked.test).name}
    flags = " ".join(f"--{key} {value}" for key, value in texts.items())
    results = {
        "command": f"python benchmarks/onnx_export.py {flags}",
        "machine": machine.fingerprint(),
        "settings": {"model": asked.model, "samples": asked.samples, "test_samples": asked.test_samples, **texts},
        "rows": rows,
        "speed": {"prompt": PROMPT, "generate": STEPS, "turns": TURNS, "compared": speed},
    }
    write_json(RESULTS, results)
    for row in rows:
        value = row["perplexity"]["value"] if row["perplexity"] else row["error"]
        print(row["name"], value, row["size_bytes"], (row["facts"] or {}).get("embedding_bytes"))
    print(json.dumps(speed, indent=1))


def _perplexity(settings: dict[str, Any]) -> Any:
    from lighten.evaluate.perplexity.settings import Perplexity

    return Perplexity(**settings)


def _row(row: dict[str, Any], test: str) -> dict[str, Any]:
    if row.get("perplexity"):  # the name of the text, not where it lies here
        row["perplexity"]["protocol"]["data"] = Path(test).name
    kept = ("name", "status", "error", "size_bytes", "bits_per_weight", "runtime", "perplexity", "divergence", "facts")
    return {key: row.get(key) for key in kept}


def build_alone(source: Path, out: Path, options: dict[str, str]) -> None:
    """Makes int4 of a model directory with the builder and nothing else; what `options` lacks is its default."""
    from lighten.export.onnx.genai import build

    build(source, out, "int4", "cpu", {"hf_token": "false", **options})


if __name__ == "__main__":
    main()
