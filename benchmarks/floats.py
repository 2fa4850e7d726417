"""MXFP4 and NVFP4: what each way of rounding costs, beside llm-compressor on the same token ids.

    python benchmarks/floats.py --model DIR --calibration wikitext2_valid.txt --test wikitext2_test.txt \\
        --peer ENV/bin/python

Every model is measured by lighten against the source, in one command. --peer is the Python of an environment with
llm-compressor. Writes benchmarks/results/floats.json; what is there in --work already is not made again. Seconds are
not kept: `quantize.py` measures those.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.model.tokens import calibration_ids
from lighten.report.numbers import NOT_MEASURED, significant
from lighten.store.store import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "floats.json"
METHODS = ("nvfp4", "mxfp4")
PEERS = {"nearest": "rtn", "gptq": "gptq"}
"""llm-compressor's ways of rounding, and the names that its script has for them."""
OURS: dict[str, list[str]] = {
    "nearest": ["--rounding", "nearest"],
    "scales": ["--rounding", "scales"],
    "gptq": ["--rounding", "gptq"],
    "gptq, two streams": ["--rounding", "gptq", "--propagate", "auto"],
}
LINES = {
    **{("llm-compressor", rounding): f"llm-compressor, {rounding}" for rounding in PEERS},
    **{("lighten", rounding): f"`{rounding}`" for rounding in OURS},
    ("lighten", "gptq, two streams"): "`gptq`, `propagate: auto`",
}
"""Lines of the table."""


@dataclass(frozen=True)
class Model:
    """One of the models that are made."""

    tool: str
    method: str
    activations: bool
    rounding: str

    @property
    def folder(self) -> str:
        """Name of its directory."""
        kind = "w4a4" if self.activations else "w4a16"
        return f"{self.tool}-{self.method}-{kind}-{self.rounding.replace(', ', '-').replace(' ', '-')}"


def models(with_peer: bool) -> Iterator[Model]:
    """Yields the models in the order in which they are made."""
    for activations in (False, True):
        for method in METHODS:
            for rounding in PEERS if with_peer else ():
                yield Model("llm-compressor", method, activations, rounding)
            for rounding in OURS:
                yield Model("lighten", method, activations, rounding)


def made(asked: argparse.Namespace, model: Model, ids: Path, store: list[str]) -> dict[str, Any]:
    """Makes a model unless it is there; returns its row, with the last line of what was said if it failed."""
    out = asked.work / model.folder
    row = {**vars(model), "path": str(out), "error": None}
    if model.tool == "lighten":
        text = ["--data", asked.calibration, "--samples", str(asked.samples), "--length", str(asked.length)]
        flags = ["--method", model.method, *OURS[model.rounding], *(["--activations"] if model.activations else [])]
        command = [sys.executable, "-m", "lighten", "quantize", str(asked.model), *flags, *text, *store, "-o", str(out)]
    else:
        file, scheme = asked.work / "task.json", model.method.upper() + ("" if model.activations else "A16")
        task = {"scheme": scheme, "method": PEERS[model.rounding], "model": str(asked.model), "ids": str(ids)}
        file.write_text(json.dumps({**task, "out": str(out)}))
        command = [asked.peer, str(HERE / "peers" / "with_llmcompressor.py"), str(file)]
    if not out.is_dir():
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            row["error"] = (done.stdout + done.stderr).strip().splitlines()[-1]
    print(row, flush=True)
    return row


def main() -> None:
    """Makes the models, measures them, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--name", help="name of the model in the table")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--test", required=True, help="text file to measure on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--test-samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--only", action="append", help="models to make, such as '*-nvfp4-w4a16-*'; may be repeated")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "floats")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    ids = asked.work / "ids.json"
    ids.write_text(json.dumps(calibration_ids(asked.model, asked.calibration, asked.samples, asked.length).tolist()))
    store = ["--artifacts", str(asked.work / "store")]
    wanted = [
        model
        for model in models(bool(asked.peer))
        if any(fnmatch(model.folder, pattern) for pattern in asked.only or ["*"])
    ]
    rows = [made(asked, model, ids, store) for model in wanted]
    whole = [row for row in rows if not row["error"]]
    paths = [str(asked.model), *(row["path"] for row in whole)]
    text = ["--data", asked.test, "--samples", str(asked.test_samples), "--length", str(asked.length)]
    command = [sys.executable, "-m", "lighten", "evaluate", *paths, *text, *store]
    done = subprocess.run([*command, "--skip", "accuracy", "--skip", "speed", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    source: dict[str, Any] = {"tool": "source"}
    for row, measured in zip([source, *whole], json.loads(done.stdout)["variants"], strict=True):
        kept = ("status", "error", "format", "size_bytes", "perplexity", "divergence", "runtime")
        row |= {key: measured.get(key) for key in kept}
        if protocol := (row["perplexity"] or {}).get("protocol"):
            protocol["data"] = Path(asked.test).name  # not its place on this machine
    for row in rows:
        del row["path"]
    settings = {
        "model": asked.name or asked.model.name,
        "samples": asked.samples,
        "length": asked.length,
        "test_samples": asked.test_samples,
        "calibration": Path(asked.calibration).name,
        "test": Path(asked.test).name,
    }
    words = ["--calibration", settings["calibration"], "--test", settings["test"], "--peer ENV/bin/python"]
    words += ["--samples", str(asked.samples), "--test-samples", str(asked.test_samples)]
    words += [f"--only '{pattern}'" for pattern in asked.only or ()]
    found = {
        "command": " ".join(["python benchmarks/floats.py --model DIR", *words]),
        "machine": machine.fingerprint(),
        "versions": _versions(asked.peer) if asked.peer else {},
        "settings": settings,
        "rows": [source, *rows],
    }
    write_json(asked.results, found)
    print(table(found))


def _versions(peer: str) -> dict[str, str]:
    """Returns the versions of the packages of the other environment."""
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    script = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    versions: dict[str, str] = json.loads(subprocess.check_output([peer, "-c", script], text=True))
    return versions


def table(found: dict[str, Any]) -> str:
    """Returns perplexity and KL of each way of rounding, for both formats, weights only and with 4-bit inputs."""
    from tables import made as machine_of
    from tables import rows

    by = {(row["tool"], row.get("rounding"), row.get("method"), row.get("activations")): row for row in found["rows"]}
    kinds = [(method, activations) for activations in (False, True) for method in METHODS]
    there = {(row.get("method"), row.get("activations")) for row in found["rows"]}
    kinds = [kind for kind in kinds if kind in there]
    lines = []
    for (tool, rounding), title in LINES.items():
        if not any((row["tool"], row.get("rounding")) == (tool, rounding) for row in found["rows"]):
            continue
        cells = [title]
        for method, activations in kinds:
            row = by.get((tool, rounding, method, activations)) or {}
            measured, divergence = row.get("perplexity"), row.get("divergence")
            cells.append(significant(measured["value"], 4) if measured else "refused" if row else NOT_MEASURED)
            cells.append(significant(divergence["kl_mean"], 3) if divergence else NOT_MEASURED)
        lines.append(cells)
    titles = [""]
    for method, activations in kinds:
        titles += [f"{method.upper()}{', 4-bit inputs' if activations else ''}", "KL"]
    settings, version = found["settings"], found["versions"].get("llmcompressor", "")
    value = by["source", None, None, None]["perplexity"]["value"]
    caption = (
        f"{settings['model']}, calibrated on {settings['samples']} × {settings['length']} tokens of "
        f"{settings['calibration']}: perplexity and KL to the source in nats on {settings['test_samples']} × "
        f"{settings['length']} tokens of {settings['test']}. The source has "
        f"{significant(value, 4)}. llm-compressor {version} got the same token ids. Every model is measured by lighten."
    )
    return f"{rows(titles, lines)}\n\n{caption}\n\n{machine_of(found)}"


if __name__ == "__main__":
    main()
