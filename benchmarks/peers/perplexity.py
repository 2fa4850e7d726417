"""Perplexity by transformers alone, in a peer's own environment: for an output that `lighten evaluate` cannot open.

`python perplexity.py TASK.json`, where ids are the chunks to score. The protocol is lighten's: every position of a
chunk but the first, in float32.
"""

from __future__ import annotations

import math
from typing import Any

import task


def work(asked: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    chunks = torch.tensor(task.ids(asked))
    total = 0.0
    with torch.inference_mode():
        for chunk in chunks:
            logits = model(input_ids=chunk[None]).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, chunk[1:], reduction="sum").item()
    return {"perplexity": math.exp(total / (chunks.shape[0] * (chunks.shape[1] - 1)))}


if __name__ == "__main__":
    task.main(work)
