"""Peak memory and time of the sweep and of GPTQ on a model of 1 billion random weights with 64 experts a layer.

    python benchmarks/experts.py [--samples 32] [--length 256] [--layers 10]

Writes benchmarks/results/experts.json. The model has Qwen3-MoE's shape: 1,024 wide, experts 512 wide, 8 for each token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from memory import measure, write_tokenizer

from lighten.evaluate import machine
from lighten.model.checkpoint import Checkpoint
from lighten.store.files import MANIFEST
from lighten.store.store import write_json

RESULTS = Path(__file__).parent / "results" / "experts.json"
HIDDEN, WIDTH, EXPERTS, HEADS, KV, HEAD, VOCAB = 1024, 512, 64, 16, 4, 64, 2048


def make_random(folder: Path, layers: int) -> None:
    """Saves a randomly initialised model in bfloat16, one tensor at a time, with a matrix per expert."""
    import torch
    from transformers import Qwen3MoeConfig

    from lighten.model.shards import ShardWriter

    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=HEAD,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    shapes["lm_head"] = (VOCAB, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HEADS * HEAD), ("k", KV * HEAD), ("v", KV * HEAD)):
            shapes[f"{prefix}self_attn.{name}_proj"] = (rows, HIDDEN)
        shapes[f"{prefix}self_attn.o_proj"] = (HIDDEN, HEADS * HEAD)
        shapes |= {f"{prefix}self_attn.{name}_norm": (HEAD,) for name in "qk"}
        shapes |= {f"{prefix}{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
        shapes[f"{prefix}mlp.gate"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            each = f"{prefix}mlp.experts.{expert}."
            shapes |= {f"{each}{name}_proj": (WIDTH, HIDDEN) for name in ("gate", "up")}
            shapes[f"{each}down_proj"] = (HIDDEN, WIDTH)
    torch.manual_seed(0)
    with ShardWriter(folder, len(shapes), shard_bytes=1_000_000_000) as writer:
        for name, size in shapes.items():
            tensor = torch.ones(size) if len(size) == 1 else torch.randn(size) * 0.02
            writer.add(f"{name}.weight", tensor.to(torch.bfloat16))
    write_tokenizer(folder)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main() -> None:
    """Makes the model, quantizes it, and writes what each stage took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (model := Path(folder) / "model").mkdir()
        make_random(model, asked.layers)
        weights = Checkpoint(model).count()
        stages = measure(str(model), asked.samples, asked.length, Path(folder))
        objects = (Path(folder) / "artifacts" / "objects").glob(f"*/{MANIFEST}")
        manifest = next(each["facts"] for each in map(_read, objects) if each.get("format") == "gptq")
    command = f"python benchmarks/experts.py --samples {asked.samples} --length {asked.length} --layers {asked.layers}"
    found: dict[str, Any] = {"weights": weights, "experts": manifest["experts"], "coverage": manifest["coverage"]}
    write_json(RESULTS, {"command": command, "machine": machine.fingerprint(), **found, "stages": stages})
    print(json.dumps({**found, "stages": stages}, indent=1))


if __name__ == "__main__":
    main()
