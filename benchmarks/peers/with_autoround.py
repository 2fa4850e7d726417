"""AutoRound: `python with_autoround.py TASK.json` quantizes with `method` rtn, opt-rtn, light or default. See task.py.

The methods are what its commands `auto-round-rtn`, `auto-round-opt-rtn` and `auto-round-light` set; data, bits and
group are those of the benchmark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import task

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"iters": 0, "disable_opt_rtn": True},
    "opt-rtn": {"iters": 0, "disable_opt_rtn": False},
    "light": {"iters": 50, "lr": 5e-3},
    "default": {"iters": 200},
}


def work(asked: dict[str, Any]) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    if not asked["method"]:
        return
    rows = torch.tensor(task.ids(asked))
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in rows.split(8)]
    rounding = AutoRound(
        asked["model"],
        tokenizer=AutoTokenizer.from_pretrained(asked["model"]),
        scheme="W4A16",
        bits=asked["bits"],
        group_size=asked["group_size"],
        sym=True,
        dataset=batches,
        nsamples=rows.shape[0],
        seqlen=rows.shape[1],
        batch_size=8,
        device_map="cpu",
        **METHODS[asked["method"]],
    )
    rounding.quantize_and_save(asked["out"], format="auto_gptq")
    out = Path(asked["out"])
    made = next(out.rglob("config.json")).parent
    if made != out:  # it adds a directory named after the model and the scheme
        for file in made.iterdir():
            file.rename(out / file.name)
        made.rmdir()


if __name__ == "__main__":
    task.main(work, "auto-round", "auto-round-lib")
