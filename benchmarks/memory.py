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
from pathlib import Path

from lighten.evaluate import machine
from lighten.store import Store, write_json

RESULTS = Path(__file__).parent / "results" / "memory.json"


def make_large(folder: Path) -> None:
    """Saves a randomly initialised Llama of TinyLlama's shape, one layer at a time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig

    from lighten.model.shards import ShardWriter

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    hidden, inner, kv = 2048, 5632, 256
    shapes = {"model.embed_tokens": (32000, hidden), "lm_head": (32000, hidden), "model.norm": (hidden,)}
    for layer in range(22):
        prefix = f"model.layers.{layer}."
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        shapes |= {f"{prefix}self_attn.{name}_proj": shape for name, shape in attention.items()}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        shapes |= {f"{prefix}mlp.{name}_proj": shape for name, shape in mlp.items()}
        shapes |= {f"{prefix}{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    torch.manual_seed(0)
    with ShardWriter(folder, len(shapes), shard_bytes=1_000_000_000) as writer:
        for name, shape in shapes.items():
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02
            writer.add(f"{name}.weight", tensor.to(torch.bfloat16))
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(model: str, samples: int, length: int, scratch: Path) -> list[dict[str, object]]:
    """Quantizes a model with the command line; returns the recorded cost of every stage."""
    artifacts = scratch / "artifacts"
    settings = ["--bits", "4", "--group-size", "64", "--samples", str(samples), "--length", str(length)]
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
        make_large(large)
        for name, model in (("135M, demo", "demo:smollm2-135m"), ("1.1B, random", str(large))):
            scratch = Path(folder) / name.split(",")[0]
            scratch.mkdir()
            rows[name] = measure(model, asked.samples, asked.length, scratch)
    command = f"python benchmarks/memory.py --samples {asked.samples} --length {asked.length}"
    write_json(RESULTS, {"command": command, "machine": machine.fingerprint(), "models": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
