"""MXFP4 and NVFP4: what each way of rounding costs, beside llm-compressor on the same token ids.

    python benchmarks/floats.py --calibration wikitext2_valid.txt --test wikitext2_test.txt --peer ENV/bin/python

Every model is measured by lighten against the source, in one command. --peer is the Python of an environment with
llm-compressor. Writes benchmarks/results/floats.json; what is there in --work already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.model.tokens import calibration_ids
from lighten.store.store import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "floats.json"
OURS: dict[str, list[str]] = {
    f"{method}{kind} {rounding}": ["--method", method, "--rounding", rounding, *flags]
    for method in ("nvfp4", "mxfp4")
    for kind, flags, roundings in (
        ("", [], ("nearest", "scales", "gptq")),
        (" w4a4", ["--activations"], ("nearest", "gptq")),
    )
    for rounding in roundings
}
PEERS = {
    f"llm-compressor {scheme} {method}": {"scheme": scheme, "method": method}
    for scheme in ("NVFP4A16", "MXFP4A16", "NVFP4", "MXFP4")
    for method in ("rtn", "gptq")
}


def make(command: list[str]) -> tuple[float, str | None]:
    """Runs a command; returns its seconds, and the last line of what it said if it failed."""
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return time.monotonic() - start, lines[-1] if done.returncode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--test", required=True, help="text file to measure on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "floats")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    ids = asked.work / "ids.json"
    ids.write_text(json.dumps(calibration_ids(asked.model, asked.calibration, asked.samples, 512).tolist()))
    store = ["--artifacts", str(asked.work / "store")]
    rows: list[dict[str, Any]] = []
    for name, flags in OURS.items():
        out = asked.work / name.replace(" ", "-")
        text = ["--data", asked.calibration, "--samples", str(asked.samples), "--length", "512"]
        command = [sys.executable, "-m", "lighten", "quantize", str(asked.model), *flags, *text, *store, "-o", str(out)]
        seconds, error = (0.0, None) if out.is_dir() else make(command)
        rows.append({"name": name, "path": str(out), "seconds": seconds, "error": error})
        print(rows[-1], flush=True)
    for name, task in PEERS.items() if asked.peer else ():
        out, file = asked.work / name.replace(" ", "-"), asked.work / "task.json"
        file.write_text(json.dumps({**task, "model": str(asked.model), "ids": str(ids), "out": str(out)}))
        script = str(HERE / "peers" / "with_llmcompressor.py")
        seconds, error = (0.0, None) if out.is_dir() else make([asked.peer, script, str(file)])
        rows.append({"name": name, "path": str(out), "seconds": seconds, "error": error})
        print(rows[-1], flush=True)
    made = [row for row in rows if not row["error"]]
    paths = [str(asked.model), *(row["path"] for row in made)]
    text = ["--data", asked.test, "--samples", str(asked.test_samples), "--length", "512"]
    command = [sys.executable, "-m", "lighten", "evaluate", *paths, *text, *store]
    done = subprocess.run([*command, "--skip", "accuracy", "--skip", "speed", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)["variants"]
    for row, measured in zip([{"name": "source"}, *made], found, strict=True):
        row.pop("path", None)
        kept = ("status", "error", "format", "size_bytes", "perplexity", "divergence", "runtime")
        row |= {key: measured.get(key) for key in kept}
        value = (row["perplexity"] or {}).get("value")
        print(row["name"], row["error"], value, (row["divergence"] or {}).get("kl_mean"), flush=True)
        if row["name"] == "source":
            rows.insert(0, row)
    head = {
        "command": "python benchmarks/floats.py --model DIR --calibration wikitext2_valid.txt --test wikitext2_test.txt"
    }
    settings = {"samples": asked.samples, "length": 512, "test_samples": asked.test_samples}
    write_json(asked.results, {**head, "machine": machine.fingerprint(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
