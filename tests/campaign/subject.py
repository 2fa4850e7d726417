"""What is disturbed: recipes over a tiny random model that go through every step, and what they should leave."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lighten.store.files import MANIFEST
from lighten.store.store import Store

TIMES = {
    "created", "cached", "predicted", "actual", "speed", "memory", "energy", "load", "machine", "version", "training",
    "seconds", "tok_s", "decode_speed_ratio", "peak_rss_bytes", "peak_bytes",
}  # fmt: skip
"""What two undisturbed runs differ in."""


def make_model(folder: Path, seed: int = 1) -> Path:
    """Writes a random Llama with a real tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import SIZES, byte_level, write_tokenizer

    folder.mkdir(parents=True)
    vocab = write_tokenizer(folder, byte_level("gpt-2"))
    sizes = {**SIZES, "intermediate_size": 512, "vocab_size": vocab + 5}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=2, bos_token_id=1)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def steps(model: Path) -> dict[str, Any]:
    """Returns a recipe with every kind of step, each measured by what is the same in every run."""
    return {
        "name": "steps",
        "model": str(model),
        "calibration": {"samples": 4, "length": 32},
        "variants": {
            "int4": [{"quantize": {"bits": 4, "group_size": 32}}],
            "slim": [
                {"prune": {"what": "mlp", "ratio": 0.25}},
                {"distill": {"length": 32, "samples": 24, "batch": 4, "steps": 12, "validation": 0.2, "save_every": 3}},
            ],
        },
        "evaluate": {"perplexity": {"length": 64, "samples": 4}, "accuracy": {"task": "builtin", "limit": 4}},
    }


def timed(model: Path) -> dict[str, Any]:
    """Returns a recipe of which most is measuring speed, in interpreters of its own."""
    return {
        "name": "timed",
        "model": str(model),
        "variants": {"rtn": [{"quantize": {"method": "rtn", "bits": 8, "group_size": 32}}]},
        "evaluate": {"speed": {"prompt": 16, "generate": 4, "repeats": 2}},
    }


def exported(model: Path) -> dict[str, Any]:
    """Returns a recipe that writes files for other runtimes; nothing is measured, so that theirs need not be there."""
    return {
        "name": "exported",
        "model": str(model),
        "calibration": {"samples": 4, "length": 32},
        "variants": {
            "q8": [{"export": {"format": "gguf", "type": "Q8_0", "imatrix": True, "parity": {"tokens": 0}}}],
            "onnx": [{"export": {"format": "onnx"}}],
        },
        "evaluate": {},
    }


def earlier(model: Path) -> dict[str, Any]:
    """Returns a recipe that is published before anything is disturbed, and must not be lost."""
    return {
        "name": "earlier",
        "model": str(model),
        "variants": {"rtn": [{"quantize": {"method": "rtn", "bits": 8, "group_size": 64}}]},
        "evaluate": {},
    }


def command(recipe: dict[str, Any], store: Path) -> list[str]:
    """Writes a recipe beside a store; returns the command line that runs it."""
    file = store.with_name(f"{store.name}-{recipe['name']}.yaml")
    file.write_text(json.dumps(recipe))
    return lighten("run", str(file), "--artifacts", str(store))


def lighten(*arguments: str) -> list[str]:
    """Returns the command line of lighten."""
    return [sys.executable, "-m", "lighten", *arguments]


def contents(store: Path, keys: set[str] | None = None) -> dict[str, str]:
    """Returns the SHA-256 of every file of every object (or of those named), as it is without times."""
    found = {}
    objects = Store(store).objects
    for key in Store(store).finished():
        if keys is not None and key not in keys:
            continue
        for path in sorted((objects / key).rglob("*")):
            if path.is_file():
                found[f"{key}/{path.relative_to(objects / key)}"] = digest(path)
    return found


def digest(path: Path) -> str:
    """Returns a file's SHA-256; of JSON without what differs from run to run."""
    content = path.read_bytes()
    if path.suffix == ".json":
        value = without_times(json.loads(content))
        if path.name == MANIFEST:  # has the sizes and hashes of the other files, with their times
            value["files"] = sorted(entry["path"] for entry in value["files"])
            del value["sha256"]
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def without_times(value: Any) -> Any:
    """Returns a JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if name not in TIMES}
    if isinstance(value, list):
        return [without_times(each) for each in value if not (isinstance(each, str) and "machine was busy" in each)]
    return value


def published(version: Path) -> dict[str, Any]:
    """Returns the results of a version without times."""
    found: dict[str, Any] = without_times(json.loads((version / "results.json").read_text()))
    return found


def everything(store: Path) -> list[str]:
    """Returns every path in a store, apart from the versions' own files."""
    paths = []
    for folder, names, files in os.walk(store):
        inside = Path(folder).relative_to(store)
        if len(inside.parts) == 2 and inside.parts[0] not in ("objects",):
            names.clear()
        paths += [str(inside / name) for name in [*names, *files]]
    return sorted(paths)
