"""Peak memory and time of source, sweep and GPTQ as the model grows: 135M parameters, then 1.1B of random weights.

    python benchmarks/memory.py [--samples 64] [--length 512]

Writes benchmarks/results/memory.json. The large model has TinyLlama's shape (2048 wide, 5632 inner, 22 layers, 32 heads
of which 4 are key/value, vocabulary 32,000) and is saved in bfloat16 shards of at most 1 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.store.store import Store, write_json

RESULTS = Path(__file__).parent / "results" / "memory.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; a head is `hidden / heads` wide."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


TINYLLAMA = Shape(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, vocab=32000, tied=False)


def make_random(folder: Path, shape: Shape, device: str = "cpu") -> None:
    """Saves a randomly initialised Llama in bfloat16, one tensor at a time; its tokenizer knows bytes.

    A GPU draws the numbers of a large model in a moment.
    """
    import torch
    from transformers import LlamaConfig

    from lighten.model.shards import ShardWriter

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,  # the tokenizer has none
        eos_token_id=None,
    )
    config.save_pretrained(folder)
    hidden, inner, kv = shape.hidden, shape.inner, shape.hidden // shape.heads * shape.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (shape.vocab, hidden), "model.norm": (hidden,)}
    if not shape.tied:
        shapes["lm_head"] = (shape.vocab, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        shapes |= {f"{prefix}self_attn.{name}_proj": size for name, size in attention.items()}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        shapes |= {f"{prefix}mlp.{name}_proj": size for name, size in mlp.items()}
        shapes |= {f"{prefix}{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    torch.manual_seed(0)
    with ShardWriter(folder, len(shapes), shard_bytes=1_000_000_000) as writer:
        for name, size in shapes.items():
            tensor = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device) * 0.02
            writer.add(f"{name}.weight", tensor.to(torch.bfloat16))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer that knows bytes, and one pair of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    alphabet["th"] = len(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[("t", "h")]))  # llama.cpp loads none without a merge
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(model: str, samples: int, length: int, scratch: Path, data: str = "builtin") -> list[dict[str, Any]]:
    """Quantizes a model with the command line; returns the recorded cost of every stage."""
    artifacts = scratch / "artifacts"
    calibration = ["--data", data, "--samples", str(samples), "--length", str(length)]
    settings = ["--bits", "4", "--group-size", "64", *calibration]
    command = [sys.executable, "-m", "lighten", "quantize", model, *settings, "-o", str(scratch / "out")]
    subprocess.run([*command, "--artifacts", str(artifacts)], check=True)
    names = ("what", "seconds", "peak_bytes", "disk_bytes")
    return [{name: cost[name] for name in names} for cost in Store(artifacts).costs()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    asked = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        large.mkdir()
        make_random(large, TINYLLAMA)
        for name, model in (("135M, demo", "demo:smollm2-135m"), ("1.1B, random", str(large))):
            scratch = Path(folder) / name.split(",")[0]
            scratch.mkdir()
            rows[name] = measure(model, asked.samples, asked.length, scratch)
    command = f"python benchmarks/memory.py --samples {asked.samples} --length {asked.length}"
    write_json(RESULTS, {"command": command, "machine": machine.fingerprint(), "models": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
