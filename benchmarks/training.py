"""Peak memory and time of a training step: gradient checkpointing on and off, fp32 against bf16, LoRA.

    python benchmarks/training.py [--device cuda]

Every setting runs in a process of its own, a few steps of distillation on the built-in text with lessons that were
written down before. Writes benchmarks/results/training.json (training_cuda.json on a GPU).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timed import last_json, timed

from lighten.evaluate import machine
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, dict[str, Any]] = {
    f"{precision}{', checkpointing' if checkpointing else ''}": {
        "precision": precision,
        "gradient_checkpointing": checkpointing,
    }
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
}
SETTINGS |= {
    "bf16, accumulate 4": {"precision": "bf16", "accumulate": 4},
    "bf16, lora 16": {"precision": "bf16", "lora": 16},
    "bf16, through a 4-bit grid": {"precision": "bf16", "quantize": {"bits": 4, "group_size": 64}},
    "bf16, the teacher runs along": {"precision": "bf16", "top_k": 0},
}


def measure(task: dict[str, Any]) -> None:
    """In a process of its own: runs a few steps; prints the time of each and the GPU memory."""
    import torch

    from lighten.compress.distill.settings import Distill
    from lighten.step import Context
    from lighten.store.artifact import Artifact

    step = Distill.model_validate(task["settings"])
    source, folder = Path(task["model"]), Path(task["folder"])
    lessons, out = folder / f"lessons-{step.lessons().top_k}", folder / "out"
    if not lessons.is_dir():
        lessons.mkdir()
        step.lessons().run(Artifact(source, {"format": "hf"}), lessons, Context(device=task["device"]))
    times: list[float] = []
    context = Context(
        lambda done, total, note: times.append(time.monotonic()),
        teacher=source,
        lessons=lessons,
        scratch=Path(tempfile.mkdtemp(dir=folder)),
        device=task["device"],
    )
    out = Path(tempfile.mkdtemp(dir=folder))
    step.run(Artifact(source, {"format": "hf"}), out, context)
    seconds = [after - before for before, after in itertools.pairwise(times)]
    gpu = torch.cuda.max_memory_allocated() if task["device"] != "cpu" else None
    print(json.dumps({"seconds": seconds, "gpu_bytes": gpu}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.task:
        measure(json.loads(Path(asked.task).read_text()))
        return
    common = {"steps": asked.steps, "batch": asked.batch, "length": asked.length, "validation": 0, "save_every": 10**6}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "source.yaml"
        recipe.write_text(json.dumps({"name": "source", "model": asked.model, "variants": {"baseline": []}}))
        prepare = f"import lighten; print(lighten.run({str(recipe)!r}, artifacts={str(folder / 'artifacts')!r}))"
        prepared = timed([sys.executable, "-P", "-c", prepare])
        model = Path(prepared.output.strip()) / "variants" / "baseline"
        task = folder / "task.json"
        for what, settings in {"": SETTINGS["bf16"], **SETTINGS}.items():  # the first one writes the lessons down
            content = {"model": str(model), "folder": name, "device": asked.device, "settings": {**common, **settings}}
            task.write_text(json.dumps(content))
            took = timed([sys.executable, __file__, "--task", str(task)])
            if took.code:
                raise SystemExit(f"{what} failed: {took.noise}")
            if not what:
                continue
            found: dict[str, Any] = last_json(took.output)
            row = {
                "setting": what,
                "seconds_per_step": statistics.median(found["seconds"]),
                "tokens_per_second": asked.batch * asked.length / statistics.median(found["seconds"]),
                "peak_bytes": found["gpu_bytes"] or took.peak_bytes,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    file = RESULTS / ("training.json" if asked.device == "cpu" else f"training_{asked.device}.json")
    settings = {"model": asked.model, "batch": asked.batch, "length": asked.length, "steps": asked.steps}
    command = f"python benchmarks/training.py{'' if asked.device == 'cpu' else f' --device {asked.device}'}"
    write_json(file, {"command": command, "machine": machine.fingerprint(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
