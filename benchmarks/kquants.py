"""K-quants rounded again (`rounding: gptq`, by one sweep or in two streams) beside those of llama.cpp's own tools.

    python benchmarks/kquants.py --model SmolLM2-135M=DIR --calibration wikitext2_valid.txt --test wikitext2_test.txt

Writes benchmarks/results/kquants.json after every row; `--resume` skips the rows that are there. Weights that come from
a quantized file lie on its grid, so a model is measured moved off it (see off_grid.py), and as it is. llama-imatrix
gets as many chunks of the same text as lighten gets samples. Both files are opened by stock llama.cpp, which computes
all logits; those of the source are transformers' in float32. The changes are paired, chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_export import costs, same_tensors
from llama_tools import VERSION, build
from off_grid import moved_off_grid
from quantizers import HERE, Kept, Row
from timed import timed
from turns import decode_in_turn

from lighten.data.text import load_text
from lighten.evaluate import machine
from lighten.evaluate.paired import student95
from lighten.evaluate.perplexity.change import by_chunk
from lighten.evaluate.perplexity.protocols import chunked
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.rows import divergence, token_logprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESULTS = HERE / "results" / "kquants.json"
TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
GRIDS = ("off its grid", "as it is")
WAYS: dict[str, tuple[str, ...]] = {"one sweep": (), "two streams": ("--propagate", "auto")}
"""How we round, and the flags for it."""
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--grid", action="append", choices=GRIDS, help="one of the two alone")
    parser.add_argument("--type", action="append", choices=TYPES, help="may be repeated (default: all)")
    parser.add_argument("--way", action="append", choices=WAYS, help="of rounding (default: both)")
    parser.add_argument("--calibration", type=Path, required=True, help="text file to calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="text file to measure perplexity on")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--test-samples", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5, help="openings for decoding, of either order; two turns each")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "kquants", help="models and files; kept")
    parser.add_argument("--tools", type=Path, help="where llama.cpp's tools are built (default: the work directory)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    asked.calibration, asked.test = asked.calibration.resolve(), asked.test.resolve()
    names = " ".join(f"--model {each.partition('=')[0]}=DIR" for each in asked.model)
    sizes = f"--samples {asked.samples} --test-samples {asked.test_samples}"
    texts = f"--calibration {asked.calibration.name} --test {asked.test.name}"
    sizes += "".join(f" --grid '{grid}'" for grid in asked.grid or ()) + f" --turns {asked.turns}"
    sizes += "".join(f" --way '{way}'" for way in asked.way or ())
    asked.command = f"python benchmarks/kquants.py {names} {texts} {sizes}"
    settings = {
        "calibration": asked.calibration.name,
        "samples": asked.samples,
        "length": LENGTH,
        "test": asked.test.name,
        "llama_cpp_python": VERSION,
    }
    kept = Kept(asked.out, asked, settings)
    bench = Bench(asked)
    for grid in asked.grid or GRIDS:
        for name, _, place in (each.partition("=") for each in asked.model):
            for type, way in product(asked.type or TYPES, asked.way or WAYS):
                what = {"model": name, "grid": grid, "type": type, "way": way}
                if not kept.find(**what):
                    row = bench.row(f"{name}-{grid.replace(' ', '-')}", bench.source(what, place), type, way)
                    kept.add({**what, **row})


class Bench:
    """What every row works on."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.work = asked, asked.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        tools = (asked.tools or self.work).resolve()
        self.imatrix, self.quantizer = build(tools, "llama-imatrix", "llama-quantize")
        self.threads = str(machine.cores())

    def source(self, what: Row, place: str) -> Path:
        """Returns the directory of a model, moved off its grid if that is asked for."""
        if what["grid"] == "as it is":
            return Path(place)
        return moved_off_grid(Path(place), self.work / f"{what['model']}-moved")

    def row(self, name: str, model: Path, type: str, way: str) -> Row:
        """Returns what both files of a type are worth."""
        ours, facts = self.ours(name, model, type, way)
        theirs = self.theirs(name, model, type)
        print(f"{name} {type}, {way}: measuring", flush=True)
        row: Row = {
            "test_samples": self.asked.test_samples,
            "ours": {"size_bytes": ours.stat().st_size},
            "theirs": {"size_bytes": theirs.stat().st_size},
            "same": same_tensors(ours, theirs),
            "tensor_types": facts["tensor_types"],
            "rounding": facts["rounding"],
        }
        found = measured(model, (ours, theirs), self.asked.test, self.asked.test_samples)
        for side in ("ours", "theirs"):
            row[side] |= found.pop(side)
        row |= found
        if self.asked.turns:
            row["decode"] = self.decoding(ours, theirs)
        for path in (ours, theirs):
            path.unlink()
        return row

    def decoding(self, ours: Path, theirs: Path) -> Row:
        """Returns how fast both files decode, and a file beside a copy of itself: what chance does.

        How a file was written decides in how large pages it is cached, so all three are copied in the same way.
        """
        places = [self.work / f"{name}.gguf" for name in ("ours", "theirs", "again")]
        for path, place in zip((ours, theirs, theirs), places, strict=True):
            shutil.copyfile(path, place)
        speed = decode_in_turn(places[0], places[1], turns=2, openings=2 * self.asked.turns)
        chance = decode_in_turn(places[2], places[1], turns=2, openings=2 * self.asked.turns)
        for place in places:
            place.unlink()
        kept = {key: speed[key] for key in ("ours_tok_s", "theirs_tok_s", "ratio")}
        return {**kept, "ratio_of_copy": chance["ratio"]}

    def lighten(self, *arguments: object) -> Row:
        """Runs a command; returns its JSON."""
        command = [sys.executable, "-m", "lighten", *map(str, arguments), "--artifacts", str(self.work / "store")]
        done = timed([*command, "--json"])
        costs(done)  # ends this process if it failed
        answer: Row = json.loads(done.output)
        return answer

    def export(self, model: Path, out: Path, *flags: object) -> Path:
        """Returns the file of `lighten export`."""
        shutil.rmtree(out, ignore_errors=True)
        self.lighten("export", model, "--format", "gguf", *flags, "--parity", "tokens=0", "-o", out)
        return next(out.glob("*.gguf"))

    def ours(self, name: str, model: Path, type: str, way: str) -> tuple[Path, Row]:
        """Returns our file, and the facts about it. The sweep of a model is kept for its other types."""
        start = time.monotonic()
        text = ("--data", self.asked.calibration, "--samples", self.asked.samples, "--length", LENGTH)
        file = self.export(model, self.work / f"{name}-{type}", "--type", type, "--rounding", "gptq", *WAYS[way], *text)
        facts: Row = json.loads((file.parent / "artifact.json").read_text(encoding="utf-8"))["facts"]
        print(f"{name} {type}, {way}: {time.monotonic() - start:.0f} s, {facts['rounding']}", flush=True)
        return file, facts

    def theirs(self, name: str, model: Path, type: str) -> Path:
        """Returns llama-quantize's file, with the matrix of llama-imatrix."""
        asked, table = self.asked, self.work / f"{name}-imatrix.gguf"
        whole, out = self.work / f"{name}-F16" / "model-F16.gguf", self.work / f"{name}-{type}.gguf"
        if not whole.is_file():
            self.export(model, whole.parent, "--type", "F16")
        if not table.is_file():
            text = ["-f", str(asked.calibration), "--chunks", str(asked.samples), "-c", str(LENGTH), "-ngl", "0"]
            costs(timed([str(self.imatrix), "-m", str(whole), *text, "-t", self.threads, "-o", str(table)]))
        costs(timed([str(self.quantizer), "--imatrix", str(table), str(whole), str(out), type, self.threads]))
        return out


def measured(source: Path, files: tuple[Path, Path], test: Path, samples: int) -> Row:
    """Returns perplexity and KL of the source, our file and theirs, and the paired changes from theirs to ours."""
    import numpy as np

    settings, tokenizer = Perplexity(data=str(test), samples=samples, length=LENGTH), open_tokenizer(source)
    ids = chunked(tokenizer.encode(load_text(settings.data, "perplexity")), settings, tokenizer).ids
    opened = {
        name: open_runtime(path) for name, path in zip(("source", "ours", "theirs"), (source, *files), strict=True)
    }
    nll, kl, same = ({name: np.empty((len(ids), LENGTH - 1)) for name in opened} for _ in range(3))
    for number, chunk in enumerate(ids):
        reference = opened["source"].logits(chunk)[:-1]
        for name, runtime in opened.items():
            logits = reference if name == "source" else runtime.logits(chunk)[:-1]
            nll[name][number] = -token_logprobs(logits, chunk[1:])[0]
            if name != "source":
                kl[name][number], same[name][number] = divergence(reference, logits)
    for runtime in opened.values():
        runtime.close()
    found: Row = {"source": {"perplexity": float(np.exp(nll["source"].mean()))}}
    for name in ("ours", "theirs"):
        found[name] = {
            "perplexity": float(np.exp(nll[name].mean())),
            "kl": float(kl[name].mean()),
            "top1": float(same[name].mean()),
        }
    found["perplexity_change"] = by_chunk(nll["ours"], nll["theirs"])
    found["kl_change"] = difference(kl["ours"], kl["theirs"])
    return found


def difference(ours: NDArray[Any], theirs: NDArray[Any]) -> Row:
    """Returns the change of a mean from theirs to ours with its 95 % interval: Student's, over chunks `[chunks, …]`."""
    change = (ours - theirs).mean(1)
    half = student95(len(change) - 1) * float(change.std(ddof=1)) / math.sqrt(len(change))
    middle = float(change.mean())
    return {"absolute": middle, "ci95": [middle - half, middle + half]}


if __name__ == "__main__":
    main()
