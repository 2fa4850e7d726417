"""What the weighting of the scale search is worth: GPTQ perplexity for powers of the columns' cost.

    python benchmarks/search.py GRAMS MODEL TEXT [--samples 40]

GRAMS is the object of a sweep, MODEL the model it swept over (both in the artifacts directory of a run), TEXT what to
measure perplexity on. Writes benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from lighten.compress.quantize import gptq as method
from lighten.compress.quantize.grid import search
from lighten.evaluate import machine
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import read_index, read_layer
from lighten.model.tokens import load_tokenizer
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "search.json"
POWERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def perplexity(model: torch.nn.Module, chunks: torch.Tensor) -> float:
    total = 0.0
    with torch.inference_mode():
        for chunk in chunks.split(4):
            logits = model(chunk).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(total / (chunks.shape[0] * (chunks.shape[1] - 1)))


def quantize(checkpoint: Checkpoint, grams: Path, state: dict[str, torch.Tensor], damping: float) -> None:
    for layer in range(len(read_index(grams)["layers"])):
        found, read_by = read_layer(grams, layer)
        for first, gram in found.items():
            names = [f"model.layers.{layer}.{name}.weight" for name, read in read_by.items() if read == first]
            weights = [checkpoint.tensor(name) for name in names]
            result = method.gptq(
                torch.cat(weights), gram.matrix(), bits=4, group_size=64, sym=True, desc_act=False, damp_percent=damping
            )
            for name, part in zip(names, result.weight().split([len(each) for each in weights]), strict=True):
                state[name].copy_(part)


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("grams", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=40)
    asked = parser.parse_args()
    checkpoint = Checkpoint(asked.model)
    ids = load_tokenizer(asked.model).encode(asked.text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    chunks = torch.tensor(ids[: asked.samples * 512]).view(-1, 512)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16).eval()
    source = perplexity(model, chunks)
    print("source", source, flush=True)
    rows = []
    for damping in (0.01, 0.05):
        for power in POWERS:
            # the method hands over the square of a column's cost
            method.search = lambda w, bits, sym, weight, kind, power=power: search(
                w, bits, sym, weight ** (power / 2), kind
            )
            quantize(checkpoint, asked.grams, model.state_dict(), damping)
            rows.append({"power": power, "damping": damping, "perplexity": perplexity(model, chunks)})
            print(rows[-1], flush=True)
    index = read_index(asked.grams)
    settings = {
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "arithmetic": "bfloat16",
        "tokens": index["tokens"],
        "test": asked.text.name,
        "test_samples": asked.samples,
    }
    head = {"command": f"python benchmarks/search.py GRAMS MODEL {asked.text.name}", "machine": machine.fingerprint()}
    write_json(RESULTS, {**head, "settings": settings, "source": source, "rows": rows})


if __name__ == "__main__":
    main()
