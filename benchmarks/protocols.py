"""Perplexity by each protocol, and by llama.cpp's own tool on the same file.

    python benchmarks/protocols.py --test wikitext2_test.txt [--samples 40]

Writes benchmarks/results/protocols.json. The tool is `llama-perplexity` of the llama.cpp inside llama-cpp-python's
source package, built with cmake for this processor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from gguf_export import directory
from llama_tools import VERSION, build

from lighten.evaluate import machine
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.pipeline.verbs import export_model, measure
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "protocols.json"
TYPES = ("F16", "Q4_K_M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--test", type=Path, required=True, help="text file to measure on")
    parser.add_argument("--samples", type=int, default=40, help="chunks at most, of every protocol but lm-eval's")
    parser.add_argument("--documents", type=int, default=10, help="articles at most, of lm-eval's protocol")
    parser.add_argument("--length", type=int, help="tokens of lm-eval's windows (default: all that the model takes)")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "protocols", help="sources and builds; kept")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (tool,) = build(work, "llama-perplexity", jobs=asked.jobs)
    model = directory(asked.model, work)
    files = []
    for kind in TYPES:
        out = work / f"export-{kind}"
        if not out.exists():
            export_model(str(model), out, format="gguf", type=kind)
        files.append(next(out.glob("*.gguf")))
    text = str(asked.test.resolve())
    protocols = [
        Perplexity(protocol=name, data=text, samples=asked.samples) for name in ("lighten", "gptq", "llama.cpp")
    ]
    articles = documents(asked.test, work / "articles.jsonl")
    protocols.append(Perplexity(protocol="lm-eval", data=articles, length=asked.length, samples=asked.documents))
    measured = measure([str(path) for path in (model, *files)], perplexity=protocols)["variants"]
    rows: list[dict[str, Any]] = []
    for name, path, found in zip(("source", *TYPES), (model, *files), measured, strict=True):
        if found["error"]:
            sys.exit(f"{path}: {found['error']}")
        by = {each["protocol"]["name"]: each for each in (found["perplexity"], *found["other_perplexity"])}
        for each in by.values():
            each["protocol"]["data"] = asked.test.name  # the name of the text, not where it lies here
        its = None if path.is_dir() else own(tool, path, asked.test, asked.samples)
        rows.append({"name": name, "protocols": by, "llama_perplexity": its})
        print(name, {protocol: each["value"] for protocol, each in by.items()}, its)
    flags = f"--test {asked.test.name} --samples {asked.samples} --documents {asked.documents}"
    flags += f" --length {asked.length}" if asked.length else ""
    results = {
        "command": f"python benchmarks/protocols.py {flags}",
        "machine": machine.fingerprint(),
        "settings": {
            "model": asked.model,
            "test": asked.test.name,
            "samples": asked.samples,
            "documents": asked.documents,
        },
        "llama_cpp_python": VERSION,
        "rows": rows,
    }
    write_json(asked.out, results)


def documents(text: Path, out: Path) -> str:
    """Writes the articles of a WikiText file, which begin with " = Title = ", as documents; returns where."""
    articles = re.split(r"(?m)^(?= = [^=\n]+ = *$)", text.read_text(encoding="utf-8"))
    lines = [json.dumps({"text": each.strip()}) for each in articles if each.strip()]
    out.write_text("\n".join(lines), encoding="utf-8")
    return str(out)


def own(tool: Path, model: Path, text: Path, chunks: int) -> float:
    """Returns what llama.cpp's tool prints, of chunks of 512 tokens, on the CPU."""
    command = [str(tool), "-m", str(model), "-f", str(text), "--chunks", str(chunks), "-c", "512", "-ngl", "0"]
    done = subprocess.run([*command, "-t", str(machine.cores())], capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return float(found[1])


if __name__ == "__main__":
    main()
