"""lm-eval: `python with_lmeval.py TASK.json` answers HellaSwag from a file with its `hf` model.

The task names model, tasks (a .jsonl file in HellaSwag's format), limit, dtype, batch_size and out, a file for the
log-likelihoods of every ending and what lm-eval makes of them. The task is lm-eval's own `hellaswag`, its documents
from the file; where a record has no ctx_a and ctx_b, the whole context is ctx_a.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import task

YAML = """include: {hellaswag}
task: hellaswag_here
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
training_split: null
"""


def work(asked: dict[str, Any]) -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    records = [json.loads(line) for line in Path(asked["tasks"]).read_text(encoding="utf-8").splitlines()]
    records = [{"ctx_a": each["ctx"], "ctx_b": "", **each} for each in records[: asked["limit"]]]
    with tempfile.TemporaryDirectory() as folder:
        data, file = Path(folder, "hellaswag.jsonl"), Path(folder, "hellaswag_here.yaml")
        data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        own = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
        file.write_text(YAML.format(hellaswag=own, data=data), encoding="utf-8")
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        model = HFLM(asked["model"], dtype=asked["dtype"], device="cpu", batch_size=asked["batch_size"])
        found = evaluator.evaluate(model, manager.load([str(file)]), bootstrap_iters=0)
    samples = sorted(found["samples"]["hellaswag_here"], key=lambda each: each["doc_id"])
    answers = {
        "logprobs": [[each[0][0] for each in sample["resps"]] for sample in samples],
        "letters": [[len(choice) for choice in sample["doc"]["choices"]] for sample in samples],
        "acc": [sample["acc"] for sample in samples],
        "acc_norm": [sample["acc_norm"] for sample in samples],
    }
    Path(asked["out"]).write_text(json.dumps(answers), encoding="utf-8")
    results = found["results"]["hellaswag_here"]
    return {name: results[f"{name},none"] for name in ("acc", "acc_norm")}


if __name__ == "__main__":
    task.main(work, "lm_eval")
