"""GGUF by lighten beside GGUF by llama.cpp's own converter and quantizer: time, memory, perplexity, decoding speed.

    python benchmarks/gguf_export.py --test wikitext2_test.txt

Writes benchmarks/results/gguf.json. The converter and the quantizer are those in llama-cpp-python's source package, the
quantizer built with cmake for this processor. Each round runs both, in turn the one or the other first;
`lighten export` then also compares the file with its source, and is timed once more without that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_tools import build, fetch
from timed import Timed, timed
from turns import PROMPT, STEPS, TURNS, decode_in_turn

import lighten
from lighten.evaluate import machine
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.pipeline.verbs import measure
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "gguf.json"
TYPE = "Q4_K_M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--test", default="builtin", help="text file to measure perplexity on")
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "gguf", help="sources and files; kept")
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = directory(asked.model, work)
    converter = Converter(work)
    runs: list[dict[str, Any]] = []
    for turn in range(asked.rounds):
        steps = [("lighten", lambda: ours(work, model, compared=True)), ("llama.cpp", lambda: converter.run(model))]
        for name, step in steps if turn % 2 else reversed(steps):
            runs.append({"tool": name, **step()})
        runs.append({"tool": "lighten, not compared", **ours(work, model, compared=False)})
    mine, theirs = next((work / "ours").glob("*.gguf")), converter.out
    settings = Perplexity(data=asked.test, samples=asked.test_samples, length=512)
    measured = measure([str(path) for path in (model, mine, theirs)], perplexity=settings)["variants"]
    rows = []
    for name, path, row in zip(("source", "lighten", "llama.cpp"), (model, mine, theirs), measured, strict=True):
        size = row["size_bytes"] if path.is_dir() else path.stat().st_size
        found = row["perplexity"]
        rows.append({"name": name, "size_bytes": size, "perplexity": found["value"], "stderr": found["stderr"]})
    text = Path(asked.test).name
    results = {
        "command": f"python benchmarks/gguf_export.py --test {text}",
        "machine": machine.fingerprint(),
        "settings": {"model": asked.model, "type": TYPE, "test": text, "test_samples": asked.test_samples},
        "runs": runs,
        "summary": {
            name: summary([run for run in runs if run["tool"] == name]) for name in {run["tool"]: 0 for run in runs}
        },
        "rows": rows,
        "same_tensors": same_tensors(mine, theirs),
        "speed": {"prompt": PROMPT, "generate": STEPS, "turns": TURNS, **decode_in_turn(mine, theirs)},
    }
    write_json(RESULTS, results)
    for name, each in results["summary"].items():
        print(f"{name}: {each['seconds']:.1f} s, {each['peak_bytes'] / 1e6:.0f} MB")
    for row in rows:
        print(f"{row['name']}: perplexity {row['perplexity']:.4f}, {row['size_bytes']} bytes")
    print(f"decoding: {results['speed']['ratio']:.3f} of llama.cpp's; tensors alike: {results['same_tensors']}")


def directory(model: str, work: Path) -> Path:
    """Returns a model as a directory in the form of transformers, which both converters read."""
    recipe = work / "gguf.yaml"
    content = {"name": "gguf", "model": model, "evaluate": {}}
    recipe.write_text(
        json.dumps({**content, "variants": {"f16": [{"export": {"format": "gguf", "type": "F16"}}]}}), encoding="utf-8"
    )
    return (lighten.run(str(recipe), artifacts=work) / "variants" / "baseline").resolve()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak_bytes")}


def ours(work: Path, model: Path, *, compared: bool) -> dict[str, Any]:
    """Exports with lighten from an empty store; returns seconds and peak."""
    name = "ours" if compared else "alone"
    for each in (work / name, work / "store"):
        shutil.rmtree(each, ignore_errors=True)
    command = [sys.executable, "-m", "lighten", "export", str(model), "--format", "gguf", "--type", TYPE]
    command += [] if compared else ["--parity", "tokens=0"]
    return costs(timed([*command, "-o", str(work / name), "--artifacts", str(work / "store")]))


class Converter:
    """llama.cpp's own way: convert_hf_to_gguf.py, then its quantizer."""

    def __init__(self, work: Path) -> None:
        self.source = fetch(work)
        (self.quantizer,) = build(work, "llama-quantize")
        self.packages = work / "packages"
        if not self.packages.is_dir():  # what its converter imports and lighten does not
            command = [sys.executable, "-m", "pip", "install", "--target", str(self.packages), "sentencepiece"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        self.whole, self.out = work / "theirs-f16.gguf", work / "theirs.gguf"

    def run(self, model: Path) -> dict[str, Any]:
        """Converts and quantizes; returns seconds and peak of the two commands."""
        for path in (self.whole, self.out):
            path.unlink(missing_ok=True)
        script = str(self.source / "convert_hf_to_gguf.py")
        command = [sys.executable, script, str(model), "--outtype", "f16", "--outfile", str(self.whole)]
        steps = [
            costs(timed(command, env={"PYTHONPATH": str(self.packages)})),
            costs(timed([str(self.quantizer), str(self.whole), str(self.out), TYPE])),
        ]
        return {
            "seconds": sum(step["seconds"] for step in steps),
            "peak_bytes": max(step["peak_bytes"] for step in steps),
            "steps": [step["seconds"] for step in steps],
        }


def costs(done: Timed) -> dict[str, Any]:
    """Returns seconds and peak memory of a process; ends this one if it failed."""
    if done.code:
        sys.exit(f"failed: {done.noise[-2000:]}")
    return {"seconds": done.seconds, "peak_bytes": done.peak_bytes}


def same_tensors(ours: Path, theirs: Path) -> dict[str, int]:
    """Returns how many tensors of two files are of the same type, and how many hold the same bytes."""
    from gguf import GGUFReader

    mine, other = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (ours, theirs))
    pairs = [(mine[name], other[name]) for name in mine.keys() & other.keys()]
    return {
        "of": len(mine.keys() | other.keys()),
        "type": sum(a.tensor_type == b.tensor_type for a, b in pairs),
        "bytes": sum(a.data.tobytes() == b.data.tobytes() for a, b in pairs),
    }


if __name__ == "__main__":
    main()
