"""All families of transformers, one after the other: `make families`. Writes benchmarks/results/families.json.

Each runs in a process of its own with limits of memory and time, because some classes ignore the small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from lighten.evaluate import machine
from lighten.model import stream
from tests.families.models import write
from tests.families.trial import trial

MEMORY, SECONDS = 8 << 30, 120
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"
EXACT = 1e-3
"""Largest difference of outputs, as a share of the largest, that counts as the same in float32."""


def types() -> dict[str, str]:
    """Returns the model types of the installed transformers, and which kind each is."""
    causal = dict.fromkeys(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal")
    both = dict.fromkeys(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "image-text")
    return {**both, **{name: "image-text" if name in both else kind for name, kind in causal.items()}}


def judged(row: dict[str, Any]) -> str:
    """Returns "ok", or what is wrong with a row."""
    if "error" in row:
        return str(row["error"])
    wrong = []
    if row["sweep"] > EXACT:
        wrong.append(f"the sweep differs from the forward by {row['sweep']:.1e}")
    for name, found in row["methods"].items():
        if found.get("opened", 0.0) > EXACT:
            wrong.append(f"{name}: opened, it differs by {found['opened']:.1e}")
        if found["coverage"] < 0.99 * row["fits"]:
            wrong.append(f"{name} covers {found['coverage']:.0%} of {row['fits']:.0%}")
        if not found["perplexity"] < 1.5 * row["perplexity"]:
            wrong.append(f"{name}: perplexity {found['perplexity']:.3g} against {row['perplexity']:.3g}")
    return "; ".join(wrong) or "ok"


def one(family: str, kind: str, answer: Path) -> None:
    """Tries a family, and writes its row."""
    folder = Path(tempfile.mkdtemp(prefix="families-"))
    row: dict[str, Any]
    start, stage = time.monotonic(), "made"
    try:
        (folder / "model").mkdir()
        write(family, folder / "model")
        stage = "tried"
        row = trial(folder)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = str(error).replace(str(folder / "model"), "the model").replace(str(folder), "the directory")
        first = (told.strip().splitlines() or [""])[0]
        row = {"error": f"{type(error).__name__}: {first[:200]}", "stage": stage, "where": f"{where.name}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    row = {"family": family, "kind": kind, **row, "seconds": round(time.monotonic() - start, 1)}
    answer.write_text(json.dumps({**row, "verdict": judged(row)}))


def main() -> None:
    """Tries families, several at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; all that transformers knows if none is given")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    stream.fast_dtype = lambda device: torch.float32  # the sweep's numbers are those of the plain forward
    known = types()
    wanted = list(options.families) or sorted(known)
    rows: list[dict[str, Any]] = []
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        while wanted or running:
            while wanted and len(running) < options.processes:
                family = wanted.pop(0)
                answer = Path(scratch) / f"{family}.json"
                process = os.fork()
                if process == 0:
                    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                    signal.alarm(SECONDS)
                    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                    one(family, known[family], answer)
                    os._exit(0)
                running[process] = (family, answer)
            process, status = os.wait()
            family, answer = running.pop(process)
            if answer.is_file():
                row = json.loads(answer.read_text())
            else:
                why = "no answer in time" if status == signal.SIGALRM else f"its process ended with {status}"
                row = {"family": family, "kind": known[family], "error": why, "stage": "tried", "verdict": why}
            rows.append(row)
            print(f"{row['family']:28} {row.get('seconds', 0):6.1f} s  {row['verdict'][:160]}", flush=True)
    rows.sort(key=lambda row: row["family"])
    if not options.families:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        told = {"command": "make families", "machine": machine.fingerprint(), "versions": versions, "families": rows}
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    for kind in ("causal", "image-text"):
        of = [row for row in rows if row["kind"] == kind]
        print(f"{kind}: {sum(row['verdict'] == 'ok' for row in of)} of {len(of)}")


if __name__ == "__main__":
    main()
