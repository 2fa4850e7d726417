"""Every quantizer at few bits: models on their grid and off it, each tool on the same token ids.

    python benchmarks/low_bits.py --model SmolLM2-135M=DIR --model Gemma-3-270M=DIR \\
        --calibration wikitext2_valid.txt --test wikitext2_test.txt --peer autoround=PYTHON

Runs `quantize.py` for every model, grid, bits and group size, and gathers its rows in benchmarks/results/low_bits.json
after each of them. `--only` chooses runs as it does there. What was measured already stays, and so do the commands that
did it; `--fresh` begins anew. A run that had the machine to itself is marked so with `--quiet`: the others' seconds are
not told.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

from kquants import GRIDS
from off_grid import moved_off_grid
from quantizers import HERE, RUNS, Row

from lighten.evaluate import machine
from lighten.store.store import write_json

RESULTS = HERE / "results" / "low_bits.json"
KEPT = ("run", "tool", "method", "error", "size_bytes", "perplexity", "stderr", "kl", "top1", "change", "accuracy")
COSTS = ("seconds", "peak_bytes", "parts")
CASE = ("model", "grid", "bits", "group_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--grid", action="append", choices=GRIDS, help="one of the two alone")
    parser.add_argument("--bits", action="append", type=int, help="may be repeated (default: 4, 3, 2)")
    parser.add_argument("--group-size", action="append", type=int, help="may be repeated (default: 64)")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on")
    parser.add_argument("--test", required=True, help="text file to measure perplexity on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--task", type=Path, help="questions in HellaSwag's format (.jsonl)")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="runs such as 'autoround-*'")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "low-bits")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quiet", action="store_true", help="nothing else runs here: keep seconds and memory")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    asked = parser.parse_args()
    asked.work = asked.work.resolve()
    asked.work.mkdir(parents=True, exist_ok=True)
    kept = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() and not asked.fresh else {}
    rows: list[Row] = kept.get("rows", [])
    texts = {"calibration": Path(asked.calibration).name, "test": Path(asked.test).name}
    settings = {**texts, "samples": asked.samples, "length": 512, "test_samples": asked.test_samples}
    if kept and kept["settings"] != settings:
        raise SystemExit(f"{asked.out} was measured with {kept['settings']}; give --fresh to begin anew")
    ran = [each for each in kept.get("command", "").split("; ") if each]
    head: Row = {"command": "; ".join(dict.fromkeys([*ran, command(asked)])), "settings": settings}
    # seconds are those of the runs that had the machine to themselves: it is theirs that is told
    head["machine"] = machine.fingerprint() if asked.quiet or not kept else kept["machine"]
    versions: Row = kept.get("facts", {}).get("versions", {})
    models = dict(each.partition("=")[::2] for each in asked.model)
    for (name, place), grid, bits, group in product(
        models.items(), asked.grid or GRIDS, asked.bits or (4, 3, 2), asked.group_size or (64,)
    ):
        case = dict(zip(CASE, (name, grid, bits, group), strict=True))
        found = measure(asked, case, source(asked.work, name, grid, Path(place)), rows)
        versions |= found["facts"].get("versions", {})
        for row in found["rows"]:
            rows[:] = [each for each in rows if any(each[key] != {**case, **row}[key] for key in (*CASE, "run"))]
            costs = {key: row[key] for key in COSTS if key in row} if asked.quiet else {}
            told = {key: row[key] for key in KEPT if key in row}
            rows.append({**case, **told, **costs, "source": found["facts"].get("source", {}).get("value")})
        rows.sort(key=lambda row: [*(str(row[key]) for key in ("model", "grid")), -row["bits"], order(row["run"])])
        write_json(asked.out, {**head, "facts": {"versions": versions}, "rows": rows})


def order(run: str) -> int:
    """Returns the place of a run among all of them."""
    return [each.name for each in RUNS].index(run)


def source(work: Path, name: str, grid: str, place: Path) -> Path:
    """Returns the directory of a model, moved off its grid if that is asked for."""
    if grid == "as it is":
        return place.resolve()
    return moved_off_grid(place, work / f"{name}-moved")


def measure(asked: argparse.Namespace, case: Row, model: Path, rows: list[Row]) -> Row:
    """Runs the tools on one case, without those that `rows` have; returns what `quantize.py` wrote."""
    folder = asked.work / "-".join(str(value).replace(" ", "-") for value in case.values())
    done = {row["run"] for row in rows if all(row[key] == value for key, value in case.items()) and not row["error"]}
    wanted = [run.name for run in RUNS if run.name not in done and chosen(asked, run.name)]
    if not wanted:
        return {"rows": [], "facts": {}}
    flags = ["--model", model, "--calibration", asked.calibration, "--test", asked.test, "--rounds", "1"]
    flags += ["--bits", case["bits"], "--group-size", case["group_size"], "--results", folder, "--work", folder]
    flags += ["--samples", asked.samples, "--test-samples", asked.test_samples]
    flags += ["--task", asked.task, "--questions", asked.questions] if asked.task else []
    flags += [word for name in wanted for word in ("--only", name)]
    flags += [word for peer in asked.peer for word in ("--peer", peer)]
    print(", ".join(map(str, case.values())), flush=True)
    subprocess.run([sys.executable, str(HERE / "quantize.py"), *map(str, flags)], check=True)
    found: Row = json.loads((folder / "quantize.json").read_text(encoding="utf-8"))
    return found


def chosen(asked: argparse.Namespace, run: str) -> bool:
    """Returns whether --only lets a run through, and its tool is there."""
    tool = next(each.tool for each in RUNS if each.name == run)
    there = tool == "lighten" or tool in {peer.partition("=")[0] for peer in asked.peer}
    return there and any(fnmatch(run, pattern) for pattern in asked.only or ("*",))


def command(asked: argparse.Namespace) -> str:
    """Returns the command line without the places of this machine."""
    words = [f"--model {each.partition('=')[0]}=DIR" for each in asked.model]
    words += [f"--calibration {Path(asked.calibration).name} --test {Path(asked.test).name}"]
    words += [f"--grid '{grid}'" for grid in asked.grid or ()]
    words += [f"--bits {bits}" for bits in asked.bits or ()]
    words += [f"--only '{pattern}'" for pattern in asked.only or ()]
    words += [f"--peer {each.partition('=')[0]}=PYTHON" for each in asked.peer]
    words += ["--quiet"] * asked.quiet
    return " ".join(["python benchmarks/low_bits.py", *words])


if __name__ == "__main__":
    main()
