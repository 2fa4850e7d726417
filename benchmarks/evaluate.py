"""HellaSwag by lighten, on torch, llama.cpp and onnxruntime, beside lm-eval's own model for transformers.

    python benchmarks/evaluate.py --tasks hellaswag.jsonl [--limit N] [--rounds 1] [--peer PYTHON]

Writes benchmarks/results/evaluate.json. All compute in float32 on the same tasks: the model directory in float32, an
F32 GGUF file and an fp32 graph made of it. Each runs in a process of its own, timed from its start to its exit; each
round turns the order round. What is compared is every task: the ending that is chosen, by likelihood and by
likelihood per character, and whether it is the right one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf_export import costs, directory
from timed import last_json, timed

from lighten.evaluate import machine
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.request import Request
from lighten.model.llama_library import installed
from lighten.store.store import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "evaluate.json"
TIE = 1e-3
"""Nats by which two endings may differ and still count as a tie."""
OURS = """
import json, sys
from lighten.evaluate.run import measure
measure(json.loads(sys.argv[1]), lambda done, total, note: None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--tasks", type=Path, required=True, help="a .jsonl file in HellaSwag's format")
    parser.add_argument("--limit", type=int, help="tasks at most (default: all of the file)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16], help="of lm-eval; the quickest counts")
    parser.add_argument("--peer", default=sys.executable, help="the Python that has lm-eval")
    parser.add_argument("--work", type=Path, default=Path("artifacts") / "evaluate", help="models; kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    tasks = asked.tasks.resolve()
    models = exports(directory(asked.model, work), work)
    steps = {
        f"lighten, {name}": (lambda path=path: ours(path, models["torch"], tasks, asked.limit))
        for name, path in models.items()
    }
    for size in asked.batch_size:
        steps[f"lm-eval, batch {size}"] = lambda size=size: theirs(
            asked.peer, models["torch"], tasks, asked.limit, size
        )
    runs: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Any]] = {}
    for turn in range(asked.rounds):
        for name in list(steps) if turn % 2 == 0 else reversed(steps):
            run = steps[name]()
            answers[name] = run.pop("answers")
            runs.append({"name": name, **run})
            print(f"{name}: {run['seconds']:.1f} s, {run['peak_bytes'] / 1e6:.0f} MB", flush=True)
    rows = [row(name, [run for run in runs if run["name"] == name], answers[name]) for name in steps]
    peer = min((each for each in rows if each["name"].startswith("lm-eval")), key=lambda each: each["seconds"])
    for each in rows:
        each["share_of_lm_eval"] = each["seconds"] / peer["seconds"]
    first = answers["lighten, torch"]
    pairs = [
        ("lighten, torch", peer["name"]),
        *((f"lighten, {name}", "lighten, torch") for name in models if name != "torch"),
    ]
    llama = installed()
    assert llama  # its runtime was measured
    results = {
        "command": f"python benchmarks/evaluate.py --tasks {tasks.name}"
        + (f" --limit {asked.limit}" if asked.limit else "")
        + f" --rounds {asked.rounds} --batch-size {' '.join(map(str, asked.batch_size))}",
        "machine": machine.fingerprint(),
        "settings": {
            "model": asked.model,
            "tasks": tasks.name,
            "n": len(first["acc"]),
            "dtype": "float32",
            "tie_nats": TIE,
            "lm_eval": next(run["versions"] for run in runs if "versions" in run),
            "llama_cpp": f"{llama.package} {llama.version}",
            "onnxruntime": version("onnxruntime"),
        },
        "runs": runs,
        "rows": rows,
        "agreement": [{"name": a, "with": b, **agreement(answers[a], answers[b])} for a, b in pairs],
    }
    write_json(asked.out, results)
    for each in results["agreement"]:
        print(each)


def exports(model: Path, work: Path) -> dict[str, Path]:
    """Returns the model directory, and the F32 GGUF file and the fp32 graph made of it."""
    made = {"torch": model}
    flags = {"llama.cpp": ("gguf", "--type", "F32"), "onnxruntime": ("onnx", "--precision", "fp32")}
    for name, (kind, *more) in flags.items():
        out = work / f"export-{kind}"
        if not out.exists():
            command = [sys.executable, "-m", "lighten", "export", str(model), "--format", kind, *more]
            costs(timed([*command, "-o", str(out), "--artifacts", str(work)]))
        made[name] = next(out.glob("*.gguf")) if kind == "gguf" else out
    return made


def ours(path: Path, tokenizer: Path, tasks: Path, limit: int | None) -> dict[str, Any]:
    """Measures with lighten's scorer; returns seconds, peak and the answers."""
    from safetensors.numpy import load_file

    from lighten.data.choices import load_choices

    with tempfile.TemporaryDirectory() as folder:
        asked = Accuracy(task="hellaswag", local=str(tasks), limit=limit)
        request = Request(asked, path, tokenizer, Path(folder), device="cpu", trust_remote_code=False)
        spent = costs(timed([sys.executable, "-P", "-c", OURS, json.dumps(request.payload())]))
        values = load_file(Path(folder) / "values.safetensors")
        result = json.loads((Path(folder) / "result.json").read_text())
    letters = [[len(ending) for ending in task.endings] for task in load_choices(str(tasks), limit)]
    right = {
        name: (values[choice] == values["label"]) for name, choice in (("acc", "choice"), ("acc_norm", "choice_norm"))
    }
    answers = {"logprobs": values["logprobs"].tolist(), "letters": letters}
    return {
        **spent,
        "dtype": result["dtype"],
        "answers": answers | {name: each.tolist() for name, each in right.items()},
    }


def theirs(python: str, model: Path, tasks: Path, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Measures with lm-eval's own model for transformers."""
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder, "out.json"), Path(folder, "task.json")
        asked = {"model": str(model), "tasks": str(tasks), "limit": limit, "dtype": "float32"}
        file.write_text(json.dumps({**asked, "batch_size": batch_size, "out": str(out)}))
        done = timed([python, str(HERE / "peers" / "with_lmeval.py"), str(file)])
        spent, answer = costs(done), last_json(done.output)
        return {**spent, "versions": answer["versions"], "answers": json.loads(out.read_text())}


def row(name: str, runs: list[dict[str, Any]], answers: dict[str, Any]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    return {
        "name": name,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        **{key: float(np.mean(answers[key])) for key in ("acc", "acc_norm")},
    }


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns in how many tasks two choose the same ending, and how many of the others are ties."""
    found: dict[str, Any] = {"of": len(ours["acc"])}
    gaps = [
        abs(a - b)
        for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    found["largest_gap_nats"] = max(gaps)
    for name, divided in (("acc", False), ("acc_norm", True)):
        pairs = [_scores(each, divided) for each in (ours, theirs)]
        chosen = [[int(np.argmax(row)) for row in scores] for scores in pairs]
        differ = [n for n, (a, b) in enumerate(zip(*chosen, strict=True)) if a != b]
        ties = [n for n in differ if all(abs(each[n][chosen[0][n]] - each[n][chosen[1][n]]) < TIE for each in pairs)]
        found[name] = {
            "same_choice": found["of"] - len(differ),
            "ties": len(ties),
            "same_result": sum(bool(a) == bool(b) for a, b in zip(ours[name], theirs[name], strict=True)),
        }
    return found


def _scores(answers: dict[str, Any], divided: bool) -> list[Any]:
    rows = [np.array(row) for row in answers["logprobs"]]
    return [row / np.array(size) for row, size in zip(rows, answers["letters"], strict=True)] if divided else rows


if __name__ == "__main__":
    main()
