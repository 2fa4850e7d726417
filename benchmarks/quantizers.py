"""What the benchmark of quantizers works on: its tools, its runs, its commands and its files of results."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timed import Timed, last_json, timed

from lighten.evaluate import machine
from lighten.store.store import write_json

HERE = Path(__file__).resolve().parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
LIGHTEN = (sys.executable, "-m", "lighten")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One tool with one method."""

    name: str
    tool: str
    """"lighten", or the peer whose environment and script do it."""
    method: str
    against: str
    """The run of ours that its cost is divided by."""
    flags: tuple[str, ...] = ()
    """Flags of `lighten quantize`; none for the method alone."""
    polished: bool = False
    """Whether `lighten polish` follows. Costs are those of both commands."""


STATIC = ("--desc-act", "--static-groups")
STREAMS = ("--method", "gptq", *STATIC, "--propagate", "auto")
RUNS = (
    Run("lighten-gptq", "lighten", "gptq", "lighten-gptq"),
    Run("lighten-static", "lighten", "static", "lighten-gptq", ("--method", "gptq", *STATIC)),
    Run("lighten-streams", "lighten", "streams", "lighten-gptq", STREAMS),
    Run("lighten-refined", "lighten", "refined", "lighten-gptq", (*STREAMS, "--refine", "2")),
    Run("lighten-polished", "lighten", "polished", "lighten-gptq", (*STREAMS, "--refine", "2"), polished=True),
    Run("gptqmodel-gptq", "gptqmodel", "gptq", "lighten-gptq"),
    Run("llmcompressor-gptq", "llmcompressor", "gptq", "lighten-gptq"),
    Run("autoround-light", "autoround", "light", "lighten-streams"),
    Run("autoround-default", "autoround", "default", "lighten-streams"),
    Run("lighten-awq", "lighten", "awq", "lighten-awq"),
    Run("gptqmodel-awq", "gptqmodel", "awq", "lighten-awq"),
    Run("gptqmodel-awq-torch", "gptqmodel", "awq-torch", "lighten-awq"),
    Run("llmcompressor-awq", "llmcompressor", "awq", "lighten-awq"),
    Run("lighten-rtn", "lighten", "rtn", "lighten-rtn"),
    Run("autoround-rtn", "autoround", "rtn", "lighten-rtn"),
    Run("autoround-opt-rtn", "autoround", "opt-rtn", "lighten-rtn"),
)
PEERS = tuple(dict.fromkeys(run.tool for run in RUNS if run.tool != "lighten"))


class Kept:
    """A file of results, written after every row."""

    def __init__(self, path: Path, asked: argparse.Namespace, settings: Row) -> None:
        """Opens the file with `--resume`, else starts it anew.

        Raises:
            SystemExit: the file holds results of other settings.
        """
        self.path = path
        self.rows: list[Row] = []
        self.facts: Row = {}
        if asked.resume and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                raise SystemExit(f"{path} was measured with {found['settings']}; leave --resume out to start anew")
            self.rows, self.facts = found["rows"], found["facts"]
        self.head = {"command": asked.command, "machine": machine.fingerprint(), "settings": settings}

    def find(self, **what: Any) -> Row | None:
        """Returns the row with these values, if it is there."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in what.items())), None)

    def add(self, row: Row) -> None:
        """Keeps a row, and says what it holds."""
        self.rows.append(row)
        self.save()
        print(json.dumps({key: value for key, value in row.items() if key != "stages"}), flush=True)

    def save(self, summary: Row | None = None) -> None:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.head, "facts": self.facts, "rows": self.rows, "summary": summary})


@dataclass(frozen=True)
class Bench:
    """What every part works on."""

    asked: argparse.Namespace
    work: Path
    model: Path
    """The source as a Hugging Face directory."""
    settings: Row

    def run(self, name: str, command: list[str]) -> tuple[Timed, Row]:
        """Runs a command; returns what it took, and a row of it with the error if it failed."""
        print(f"{name} …", flush=True)
        took = timed(command, OFFLINE, self.asked.limit, str(self.work))  # some write logs where they are started
        row: Row = {"seconds": took.seconds, "peak_bytes": took.peak_bytes, "code": took.code, "error": None}
        if took.code:
            (self.work / f"{name}.log").write_text(took.output + took.noise, encoding="utf-8")
            row["error"] = self.portable(error_of(took))
        return took, row

    def portable(self, text: str) -> str:
        """Returns a text without the places of this machine."""
        places = {str(self.work): "WORK", str(Path(sys.prefix)): "ENV", str(HERE.parent): ""}
        places |= {str(Path(python).parent.parent): name for name, python in self.asked.peers.items()}
        for place, name in places.items():
            text = text.replace(place + "/", f"{name}/" if name else "").replace(place, name)
        return text

    def wants(self, name: str) -> bool:
        """Returns whether --only lets a run or a size through."""
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.asked.only)

    def fresh(self, name: str) -> Path:
        """Returns a path under the work directory where nothing lies."""
        path = self.work / name
        remove(path)
        return path

    def lighten(self, verb: str, *arguments: str | Path) -> list[str]:
        """Returns a command of lighten's, as a person would type it."""
        return [*LIGHTEN, verb, *map(str, arguments)]

    def calibration(self) -> list[str]:
        """Returns the flags of the calibration set."""
        return [
            *("--data", self.asked.calibration),
            *("--samples", str(self.asked.samples), "--length", str(self.asked.length)),
        ]


def earlier(kept: dict[str, Any], command: str) -> list[str]:
    """Returns the commands of the runs that made a result file, but for one that comes now."""
    told = [kept["command"], *kept.get("earlier", [])] if kept else []
    return [each for each in dict.fromkeys(told) if each != command]


def error_of(took: Timed) -> str:
    """Returns the first line of what went wrong."""
    error = last_json(took.output).get("error")
    lines = [line.strip() for line in took.noise.splitlines() if line.strip()]
    ours = next((line for line in lines if line.startswith("lighten:")), None)
    ended = f"ended by signal {-took.code}" if took.code < 0 else f"exit status {took.code}"
    return str(error or ours or (f"{ended}: {lines[-1]}" if lines else ended))


def remove(path: Path) -> None:
    """Removes a tree, read-only objects of a store included."""
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o755)
    shutil.rmtree(path, ignore_errors=True)


def with_peer(bench: Bench, peer: str, task: Row, script: str = "") -> list[str]:
    """Writes a task and returns the command that a peer's own environment does it by."""
    file = bench.work / "task.json"
    file.write_text(json.dumps(task))
    return [bench.asked.peers[peer], str(HERE / "peers" / (script or f"with_{peer}.py")), str(file)]


def whole_json(text: str) -> Row:
    """Returns the object that a text is; an empty one if it is none."""
    try:
        value: Row = json.loads(text)
    except ValueError:
        return {}
    return value


def prepare(bench: Bench) -> None:
    """Writes the model directory and the token ids that every tool gets; in a process of its own."""
    from lighten.data.text import load_text
    from lighten.evaluate.perplexity.protocols import cut
    from lighten.evaluate.runtimes.choose import open_tokenizer
    from lighten.model.tokens import calibration_ids
    from lighten.pipeline import run as pipeline
    from lighten.store.files import MANIFEST

    asked = bench.asked
    if not bench.model.is_dir():
        recipe = bench.work / "source.yaml"
        recipe.write_text(json.dumps({"name": "source", "model": asked.model, "variants": {"baseline": []}}))
        version = pipeline.run(str(recipe), artifacts=bench.work / "source")
        scratch = bench.fresh("model.part")
        shutil.copytree(
            version / "variants" / "baseline",
            scratch,
            ignore=shutil.ignore_patterns(MANIFEST),
            copy_function=shutil.copyfile,
        )
        os.chmod(scratch, 0o755)
        scratch.rename(bench.model)
    ids = calibration_ids(bench.model, asked.calibration, asked.samples, asked.length)
    tokenizer = open_tokenizer(bench.model)
    text = tokenizer.encode(load_text(asked.test, "perplexity"))
    chunks = cut(text, asked.test_length, asked.test_samples, tokenizer.bos)
    (bench.work / "ids.json").write_text(json.dumps(ids.tolist()))
    (bench.work / "test_ids.json").write_text(json.dumps(chunks.tolist()))
