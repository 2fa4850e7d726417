"""What an NVIDIA GPU is worth: the methods beside the CPU's, GPTQ of an 8B-shaped model, and decoding by format.

    python benchmarks/gpu.py [--model demo:smollm2-135m] [--layers 32] [--parts equal,gptq,decode] [--scratch DIR]

Writes benchmarks/results/gpu.json after every part, so that what was measured is kept if time runs out. The first part
takes four minutes on one H200, eight layers of the second one more; what starts processes and copies files counts most.

- equal: GPTQ, AWQ, W8A8, SparseGPT and a distillation of a small model, by the CPU and by the GPU; perplexity of each.
- gptq: `lighten quantize` of a random model in the shape of Llama 3.1 8B, 128 x 2,048 tokens; seconds of every stage.
- decode: greedy decoding of the first layers of that shape in bf16, int8, nf4, fp8, gptq and awq against the bandwidth
  of the card, with the energy of a token by NVML.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from memory import make_random
from shaped import SHAPES

from lighten.data.text import builtin_text
from lighten.evaluate import machine
from lighten.store.store import Store, write_json

RESULTS = Path(__file__).parent / "results" / "gpu.json"
BOUND = 0.01
"""Largest relative difference of perplexity between the CPU's artifact and the GPU's."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gptq": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}],
    "awq": [{"quantize": {"method": "awq", "group_size": 64}}],
    "w8a8": [{"quantize": {"method": "w8a8"}}],
    "sparse": [{"prune": {"method": "sparsegpt", "pattern": "2:4"}}],
    "distil": [
        {"prune": {"what": "mlp", "ratio": 0.1}},
        {"distill": {"steps": 12, "length": 128, "batch": 8, "precision": "fp32", "top_k": 32, "validation": 0}},
    ],
}
DECODED: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "nf4": {"method": "nf4"},
    "fp8": {"method": "fp8"},
    "gptq": {"method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"method": "awq", "group_size": 128},
}
DECODED_LAYERS = 8
LIMIT = 150
"""Seconds for one format: some kernels are compiled when they are used first."""


def lighten(*arguments: str, limit: float = 600) -> str:
    """Runs the command line; returns what it printed, or raises with the end of what it said."""
    print("$ lighten", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "lighten", *arguments], capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:] or f"exit code {done.returncode}")
    return done.stdout


def equal(model: str, scratch: Path) -> dict[str, Any]:
    """Returns the perplexity of every variant by each device, and how far they are apart."""
    recipe = {
        "name": "equal",
        "model": model,
        "calibration": {"samples": 32, "length": 512},
        "variants": VARIANTS,
        "evaluate": {"perplexity": {"data": "builtin", "length": 512}},
    }
    file = scratch / "equal.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        start = time.monotonic()
        store = scratch / f"equal-{device}"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "lighten",
                "run",
                str(file),
                "--device",
                device,
                "--artifacts",
                str(store),
                "--json",
            ],
            capture_output=True,
            text=True,
        )
        version = Store(store).latest("equal")
        if version is None:
            raise RuntimeError(f"{device}: {done.stderr.strip()[-1500:]}")
        results = json.loads((version / "results.json").read_text())
        found[device] = {
            "seconds": time.monotonic() - start,
            "exit_code": done.returncode,
            "stages": {stage["name"]: (stage["actual"] or {}).get("seconds") for stage in results["stages"]},
            "variants": {
                row["name"]: {
                    "error": row["error"],
                    "perplexity": (row.get("perplexity") or {}).get("value"),
                    "arithmetic": ((row.get("perplexity") or {}).get("protocol") or {}).get("dtype"),
                    "kl": (row.get("divergence") or {}).get("kl_mean"),
                }
                for row in results["variants"]
            },
        }
    gaps = {}
    for name, ours in found["cuda"]["variants"].items():
        theirs = found["cpu"]["variants"][name]["perplexity"]
        gaps[name] = abs(ours["perplexity"] / theirs - 1) if ours["perplexity"] and theirs else None
    return {
        **found,
        "gaps": gaps,
        "bound": BOUND,
        "within": all(gap is not None and gap <= BOUND for gap in gaps.values()),
    }


def shaped(folder: Path, layers: int) -> Path:
    """Makes a random model in the shape of Llama 3.1 8B with so many layers, on the GPU."""
    folder.mkdir(parents=True)
    make_random(folder, replace(SHAPES["llama-3.1-8b"], layers=layers), device="cuda")
    return folder


def calibration(scratch: Path) -> Path:
    """Writes a text of more than 128 x 2,048 tokens of a tokenizer that knows bytes."""
    lines = builtin_text("calibration").splitlines()
    order = random.Random(0)
    text = []
    for _ in range(6):
        order.shuffle(lines)
        text += lines
    file = scratch / "calibration.txt"
    file.write_text("\n".join(text))
    return file


def gptq(scratch: Path, layers: int) -> dict[str, Any]:
    """Returns the seconds of every stage of GPTQ of the whole model."""
    start = time.monotonic()
    model = shaped(scratch / "whole", layers)
    made = time.monotonic() - start
    store = scratch / "gptq-store"
    start = time.monotonic()
    lighten(
        *("quantize", str(model), "--method", "gptq", "--bits", "4", "--group-size", "128"),
        *("--data", str(calibration(scratch)), "--samples", "128", "--length", "2048"),
        *("--device", "cuda", "--artifacts", str(store), "-o", str(scratch / "gptq-out")),
    )
    seconds = time.monotonic() - start
    stages = {
        cost["what"]: {"seconds": cost["seconds"], "peak_bytes": cost["peak_bytes"]} for cost in Store(store).costs()
    }
    for folder in (model, store, scratch / "gptq-out"):
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    return {"layers": layers, "tokens": 128 * 2048, "seconds": seconds, "making_the_model": made, "stages": stages}


def decode(scratch: Path) -> dict[str, Any]:
    """Returns speed, bandwidth and energy of every format of the shortened model."""
    model = shaped(scratch / "short", DECODED_LAYERS)
    text = calibration(scratch)
    rows: dict[str, Any] = {}
    paths = {"bf16": model}
    for name, settings in DECODED.items():
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        calibrated = ["--data", str(text), "--samples", "16", "--length", "512"] if name in ("gptq", "awq") else []
        try:
            lighten(
                *("quantize", str(model), *flags, *calibrated, "--device", "cuda"),
                *("--artifacts", str(scratch / "decode-store"), "-o", str(scratch / name)),
                limit=LIMIT,
            )
            paths[name] = scratch / name
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            rows[name] = {"error": f"quantizing: {error}"[-1200:]}
    for name, path in paths.items():
        try:
            measured = lighten(
                *("evaluate", str(path), "--skip", "perplexity", "--skip", "accuracy", "--roofline"),
                *("--device", "cuda", "--json"),
                limit=LIMIT,
            )
            rows[name] = json.loads(measured)["variants"][0]
        except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
            rows[name] = {"error": f"{error}"[-1200:]}
        print(name, json.dumps({key: rows[name].get(key) for key in ("error", "speed", "roofline")})[:400], flush=True)
    return {"layers": DECODED_LAYERS, "formats": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m", help="the model of the first part")
    parser.add_argument("--layers", type=int, default=SHAPES["llama-3.1-8b"].layers)
    parser.add_argument("--parts", default="equal,gptq,decode")
    parser.add_argument("--scratch", type=Path, help="a directory with 60 GB of room")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    work = {
        "equal": lambda scratch: equal(asked.model, scratch),
        "gptq": lambda scratch: gptq(scratch, asked.layers),
        "decode": decode,
    }
    found: dict[str, Any] = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    found |= {"command": "python benchmarks/gpu.py", "machine": machine.fingerprint()}
    found["device"] = ", ".join(found["machine"]["gpus"])
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        for part in asked.parts.split(","):
            start = time.monotonic()
            try:
                found[part] = work[part](Path(folder))
            except Exception as error:
                found[part] = {"error": f"{type(error).__name__}: {error}"[-2000:]}
            found[part]["wall_seconds"] = time.monotonic() - start
            write_json(asked.results, found)
            print(part, f"{found[part]['wall_seconds']:.0f} s", found[part].get("error", ""), flush=True)
        subprocess.run(["chmod", "-R", "u+w", folder], check=False)


if __name__ == "__main__":
    main()
