"""Quantizers side by side: lighten, GPTQModel, llm-compressor and AutoRound, each in an environment of its own.

    python benchmarks/quantize.py --peer gptqmodel=PYTHON --peer llmcompressor=PYTHON --peer autoround=PYTHON \
        --calibration wikitext2_valid.txt --test wikitext2_test.txt

Every tool gets the same model directory, the same token ids, bits and group size, and runs as a process of its own;
rounds alternate between the tools. What is timed is the whole process, from its start to its exit. Then every
output's perplexity is measured with one protocol by `lighten evaluate`, which opens each format with the loader it is
meant for.

`--part` chooses what is measured, and may be repeated:

    compare    the above                                                          results/quantize.json
    variants   1, 2, 4 and 8 variants of one sweep, and the longest one alone     results/quantize_variants.json
    growth     seconds per layer and peak memory at 0.135, 0.5 and 1.1 billion weights     results/quantize_growth.json

Results are written after every run; `--resume` skips the runs that are there. `python benchmarks/tables.py` turns
them into tables.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import memory
from quantizers import (
    HERE,
    OFFLINE,
    PEERS,
    RUNS,
    Bench,
    Kept,
    Row,
    Run,
    error_of,
    prepare,
    remove,
    whole_json,
    with_peer,
)
from timed import last_json, timed

from lighten.store.files import hash_file

VARIANTS: dict[str, list[Row]] = {
    "gptq-int4": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}],
    "q4_k_m": [{"export": {"format": "gguf", "type": "Q4_K_M", "imatrix": True}}],
    "awq-int4": [{"quantize": {"method": "awq", "bits": 4, "group_size": 64}}],
    "rtn-int4": [{"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}],
    "gptq-int3": [{"quantize": {"method": "gptq", "bits": 3, "group_size": 64}}],
    "gptq-int8": [{"quantize": {"method": "gptq", "bits": 8, "group_size": 64}}],
    "w8a8": [{"quantize": {"method": "w8a8"}}],
    "gptq-4.25": [{"quantize": {"method": "gptq", "group_size": 64, "budget": {"bits": 4.25}}}],
}
COUNTS = (1, 2, 4, 8)

QWEN = memory.Shape(hidden=896, inner=4864, layers=24, heads=14, kv_heads=2, vocab=151936, tied=True)
SIZES: dict[str, memory.Shape | None] = {"0.135B": None, "0.5B": QWEN, "1.1B": memory.TINYLLAMA}
"""The first one is the model of the other parts; the others are random weights of Qwen2.5's and TinyLlama's shapes."""


SCORES = ("perplexity", "stderr", "kl", "top1", "change", "accuracy", "scored_by", "unopened")
"""What is known of a row once its output was measured."""


def compare(bench: Bench) -> None:
    """Runs every tool in turn, round after round."""
    asked = bench.asked
    kept = Kept(asked.results / "quantize.json", asked, bench.settings)
    chosen = [run for run in RUNS if bench.wants(run.name)]
    missing = {run.tool for run in chosen} - {*asked.peers, "lighten"}
    if missing:
        print(f"not measured, no --peer given: {', '.join(sorted(missing))}", flush=True)
    chosen = [run for run in chosen if run.tool not in missing]
    for peer in dict.fromkeys(run.tool for run in chosen if run.tool != "lighten"):
        warm = timed(with_peer(bench, peer, {"method": None}), OFFLINE, where=str(bench.work))
        kept.facts.setdefault("versions", {})[peer] = last_json(warm.output).get("versions")
    kept.save()
    for number in range(1, asked.rounds + 1):
        for run in chosen:
            if not kept.find(run=run.name, round=number):
                kept.add(_quantize(bench, run, number))
        score(bench, kept, number)
    kept.save(summary(kept.rows))


def _quantize(bench: Bench, run: Run, number: int) -> Row:
    asked, name = bench.asked, f"{run.name}-{number}"
    out = bench.fresh(f"out/{name}")
    out.parent.mkdir(exist_ok=True)
    if run.tool == "lighten":
        store = bench.fresh("artifacts")
        scheme = [*(run.flags or ("--method", run.method))]
        scheme += ["--bits", str(asked.bits), "--group-size", str(asked.group_size)]
        scheme += bench.calibration()
        codes = bench.fresh(f"out/{name}-codes") if run.polished else out
        command = bench.lighten("quantize", bench.model, *scheme, "-o", codes, "--artifacts", store)
    else:
        task = {"model": str(bench.model), "ids": str(bench.work / "ids.json"), "out": str(out), "method": run.method}
        command = with_peer(bench, run.tool, {**task, "bits": asked.bits, "group_size": asked.group_size})
    took, row = bench.run(name, command)
    if run.polished and not row["error"]:
        rest = [*bench.calibration(), "-o", out, "--artifacts", store]
        _, after = bench.run(f"{name}-polish", bench.lighten("polish", codes, *rest))
        parts = [row["seconds"], after["seconds"]]
        row = {
            **after,
            "seconds": sum(parts),
            "peak_bytes": max(row["peak_bytes"], after["peak_bytes"]),
            "parts": parts,
        }
        remove(codes)
    row = {"run": run.name, "tool": run.tool, "method": run.method, "round": number, **row}
    if run.tool == "lighten":
        remove(store)
    elif "error" not in (answer := last_json(took.output)) and not answer and not took.code:
        row["error"] = "it ended without an answer"
    if not row["error"]:
        files = sorted(file for file in out.rglob("*") if file.is_file())
        row["size_bytes"] = sum(file.stat().st_size for file in files)
        weights = [hash_file(file) for file in files if file.suffix == ".safetensors"]
        row["weights_sha256"] = weights
    return row


def score(bench: Bench, kept: Kept, number: int) -> None:
    """Measures the perplexity of a round's outputs; the same weights are measured once."""
    asked = bench.asked
    waiting = []
    for row in kept.rows:
        if row["round"] != number or row["error"] or "perplexity" in row:
            continue
        twin = kept.find(run=row["run"], weights_sha256=row["weights_sha256"], round=1)
        if twin and "perplexity" in twin:
            row |= {key: twin[key] for key in SCORES if key in twin}
        else:
            waiting.append(row)
    paths = {row["run"]: bench.work / "out" / f"{row['run']}-{number}" for row in waiting}
    waiting = [row for row in waiting if paths[row["run"]].is_dir()]
    if waiting:
        protocol = ["--data", asked.test, "--samples", str(asked.test_samples), "--length", str(asked.test_length)]
        asks = ["--task", asked.task, "--limit", str(asked.questions)] if asked.task else ["--skip", "accuracy"]
        skipped = [*asks, "--skip", "speed", "--json"]
        outputs = [paths[row["run"]] for row in waiting]
        took, _ = bench.run(f"evaluate-{number}", bench.lighten("evaluate", bench.model, *outputs, *protocol, *skipped))
        found = {row["path"]: row for row in whole_json(took.output).get("variants", [])}
        source = found.get(str(bench.model), {})
        if source.get("perplexity"):
            measured = {**source["perplexity"]["protocol"], "data": Path(asked.test).name}
            kept.facts["source"] = {**source["perplexity"], "protocol": measured}
        for row in waiting:
            _score_one(bench, row, paths[row["run"]], found.get(str(paths[row["run"]]), {"error": error_of(took)}))
            print(json.dumps({key: row.get(key) for key in ("run", "perplexity", "scored_by", "unopened")}), flush=True)
    kept.save()
    if not asked.keep:
        for row in kept.rows:
            if row["round"] == number:
                remove(bench.work / "out" / f"{row['run']}-{number}")


def _score_one(bench: Bench, row: Row, out: Path, found: Row) -> None:
    if not found.get("error") and found.get("perplexity"):
        row |= {"perplexity": found["perplexity"]["value"], "stderr": found["perplexity"]["stderr"]}
        apart = found.get("divergence") or {}
        row |= {"kl": apart.get("kl_mean"), "top1": apart.get("top1_agreement"), "scored_by": "lighten evaluate"}
        row["change"] = found.get("delta")  # paired with the source
        for task in found.get("accuracy") or []:
            row["accuracy"] = {key: task[key] for key in ("acc", "acc_norm", "n", "ci95")}
        return
    row["unopened"] = bench.portable(str(found.get("error")).splitlines()[0])
    if row["tool"] == "lighten":
        return
    task = {"model": str(out), "ids": str(bench.work / "test_ids.json")}
    took, plain = bench.run(f"perplexity-{row['run']}", with_peer(bench, row["tool"], task, "perplexity.py"))
    value = last_json(took.output).get("perplexity")
    row |= {"perplexity": value, "scored_by": "transformers"} if value else {"unscored": plain["error"]}


def summary(rows: list[Row]) -> Row:
    """Returns per run the median of its rounds, and each cost divided by that of our run with the same method."""
    found: Row = {}
    for run in RUNS:
        mine = [row for row in rows if row["run"] == run.name]
        good = [row for row in mine if not row["error"]]
        if not mine:
            continue
        entry: Row = {"tool": run.tool, "method": run.method, "rounds": len(mine), "error": mine[-1]["error"]}
        if good:
            entry["error"] = None
            entry["seconds_range"] = [pick(row["seconds"] for row in good) for pick in (min, max)]
            for key in ("seconds", "peak_bytes", "size_bytes", "perplexity", "stderr", "kl"):
                values = [row[key] for row in good if row.get(key) is not None]
                entry[key] = statistics.median(values) if values else None
            entry["same_weights_every_round"] = len({json.dumps(row["weights_sha256"]) for row in good}) == 1
        else:
            entry["refused_after_seconds"] = statistics.median(row["seconds"] for row in mine)
        found[run.name] = entry
    for run in RUNS:
        ours, theirs = found.get(run.against), found.get(run.name)
        if ours and theirs and run.name != run.against and not (ours["error"] or theirs["error"]):
            costs = ("seconds", "peak_bytes", "size_bytes", "perplexity")
            ratios = {key: theirs[key] / ours[key] for key in costs if theirs[key] and ours[key]}
            theirs["times_ours"] = {"against": run.against, **ratios}
    return found


def variants(bench: Bench) -> None:
    """Runs recipes of 1, 2, 4 and 8 variants, and the variant that took longest alone, each with an empty store."""
    kept = Kept(bench.asked.results / "quantize_variants.json", bench.asked, bench.settings)
    for count in COUNTS:
        if not kept.find(count=count):
            kept.add({"count": count, **_recipe(bench, f"variants-{count}", list(VARIANTS)[:count])})
    largest = kept.find(count=COUNTS[-1])
    assert largest
    own = dict.fromkeys(largest["variants"], 0.0)
    for stage in largest["stages"]:
        if len(stage["variants"]) == 1 and stage["variants"][0] in own:
            own[stage["variants"][0]] += stage["seconds"]
    longest = max(own, key=lambda name: own[name])
    alone = kept.find(alone=longest)
    if not alone:
        alone = {"alone": longest, **_recipe(bench, "variants-alone", [longest])}
        kept.add(alone)
    kept.save(
        {
            "longest": longest,
            "longest_alone_seconds": alone["seconds"],
            "times_longest": {
                str(row["count"]): row["seconds"] / alone["seconds"] for row in kept.rows if "count" in row
            },
        }
    )


def _recipe(bench: Bench, name: str, names: list[str]) -> Row:
    asked = bench.asked
    recipe, store = bench.work / f"{name}.yaml", bench.fresh("artifacts")
    calibration = {"data": asked.calibration, "samples": asked.samples, "length": asked.length}
    content = {"name": name, "model": str(bench.model), "calibration": calibration}
    chosen = {each: VARIANTS[each] for each in names}
    recipe.write_text(json.dumps({**content, "variants": chosen, "evaluate": {}}), encoding="utf-8")
    took, row = bench.run(name, bench.lighten("run", recipe, "--artifacts", store, "--json"))
    stages = [
        {"name": stage["name"], "variants": stage["variants"], **stage["actual"]}
        for stage in whole_json(took.output).get("stages", [])
        if stage["actual"]
    ]
    seconds = [stage["seconds"] for stage in stages]
    remove(store)
    sums = {"stages_sum": sum(seconds), "stages_longest": max(seconds, default=0.0)}
    return {"variants": names, **row, **sums, "stages": stages}


def growth(bench: Bench) -> None:
    """Quantizes models of growing size; keeps seconds per layer and peak memory of the sweep and of GPTQ."""
    from lighten.model.source import find

    asked = bench.asked
    kept = Kept(asked.results / "quantize_growth.json", asked, bench.settings)
    for size, shape in SIZES.items():
        if kept.find(size=size) or not bench.wants(size):
            continue
        model, scratch = bench.model, bench.fresh("growth")
        scratch.mkdir()
        if shape:
            model = scratch / "model"
            model.mkdir()
            memory.make_random(model, shape)
        facts = find(str(model)).facts
        stages = memory.measure(str(model), asked.samples, asked.length, scratch, asked.calibration)
        per_layer = {stage["what"]: stage["seconds"] / facts.layers for stage in stages}
        row = {"size": size, "shape": shape and asdict(shape), "params": facts.params, "layers": facts.layers}
        peak = max(stage["peak_bytes"] for stage in stages)
        kept.add({**row, "seconds_per_layer": per_layer, "peak_bytes": peak, "stages": stages})
        remove(scratch)


PARTS: dict[str, Callable[[Bench], None]] = {"compare": compare, "variants": variants, "growth": growth}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure (compare)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="runs such as '*-gptq', sizes such as 0.5B")
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--calibration", type=_place, default="builtin", help="text file to calibrate on")
    parser.add_argument("--test", type=_place, default="builtin", help="text file to measure perplexity on")
    for name, default in (("samples", 64), ("length", 512), ("test-samples", 40), ("test-length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("bits", 4), ("group-size", 64), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--task", type=_place, help="questions in HellaSwag's format (.jsonl); answers are paired")
    parser.add_argument("--questions", type=int, default=500, help="of the task, at most")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lighten-benchmark")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which a run is ended")
    parser.add_argument("--keep", action="store_true", help="leave the quantized models in the work directory")
    parser.add_argument("--resume", action="store_true", help="skip the runs that the results hold")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.peers = {name: os.path.abspath(python) for name, python in (each.split("=", 1) for each in asked.peer)}
    if unknown := set(asked.peers) - set(PEERS):
        parser.error(f"--peer {unknown.pop()}: there is {', '.join(PEERS)}")
    asked.only, asked.part = asked.only or ["*"], asked.part or ["compare"]
    asked.command = _command(asked)
    return asked


def _place(given: str) -> str:
    """Returns a path that holds wherever a tool is started."""
    return os.path.abspath(given) if os.path.exists(given) else given


def _command(asked: argparse.Namespace) -> str:
    """Returns the command line without the places of this machine."""
    shown = []
    for argument in sys.argv[1:]:
        name, _, python = argument.partition("=")
        shown.append(f"{name}=PYTHON" if name in asked.peers and python else argument)
    dropped = ("--resume", "--keep")
    words = [Path(word).name if word.startswith("/") else word for word in shown if word not in dropped]
    return " ".join(["python benchmarks/quantize.py", *words])


def main() -> None:
    asked = _parse()
    asked.work.mkdir(parents=True, exist_ok=True)
    given = Path(asked.model).expanduser()
    model = given.resolve() if given.is_dir() else asked.work.resolve() / "model"
    settings = {
        "model": given.name if given.is_dir() else asked.model,
        "calibration": Path(asked.calibration).name,
        "test": Path(asked.test).name,
        **{
            name: getattr(asked, name)
            for name in ("samples", "length", "test_samples", "test_length", "bits", "group_size")
        },
        **({"task": Path(asked.task).name, "questions": asked.questions} if asked.task else {}),
    }
    bench = Bench(asked, asked.work.resolve(), model, settings)
    if asked.prepare:
        prepare(bench)
        return
    # tokenizing and the like would count as this process's memory, and so as that of what it starts
    subprocess.run([sys.executable, *sys.argv, "--prepare"], check=True)
    for part in asked.part:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
