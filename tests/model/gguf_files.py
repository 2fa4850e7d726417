"""Small GGUF files, and what is made of them."""

import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lighten.model import gguf_source

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = 2, 64, 4, 2, 96, 400
Make = Callable[..., Path]
LEARNED_FROM = Path(__file__).with_name("test_gguf_source.py")


@cache
def learned() -> tuple[list[str], list[str]]:
    """Returns tokens and merges of a small byte-level BPE; the first three tokens are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 6, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([LEARNED_FROM.read_text()], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def tensors(arch: str, tied: bool, random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    width = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN)}
        block |= {"attn_k": (width, HIDDEN), "attn_v": (width, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
        block |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        if arch == "qwen2":
            biases = {"attn_q": HIDDEN, "attn_k": width, "attn_v": width}
            shapes |= {f"blk.{layer}.{name}.bias": (size,) for name, size in biases.items()}
    return {name: random.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(
        arch: str = "llama",
        *,
        pre: str = "smollm",
        tied: bool = True,
        quantized: str = "Q8_0",
        keys: dict[str, Any] | None = None,
        change: Callable[[dict[str, np.ndarray[Any, Any]]], None] = lambda _: None,
        name: str = "m.gguf",
    ) -> Path:
        tokens, merges = learned()
        writer = gguf.GGUFWriter(tmp_path / name, arch)
        writer.add_name("Tiny")
        writer.add_license("mit")
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(5e4)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        padding = [f"[PAD{index}]" for index in range(len(tokens) + 1, VOCAB)]
        writer.add_token_list([*tokens, "<think>", *padding])
        writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3), 4, *[5] * len(padding)])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")
        for key, value in (keys or {}).items():
            getattr(writer, f"add_{key}")(value)
        held = tensors(arch, tied, np.random.default_rng(0))
        change(held)
        kind = gguf.GGMLQuantizationType[quantized]
        for tensor, values in held.items():
            if values.ndim == 2:
                writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def converted(path: Path, name: str = "hf") -> Path:
    out = path.parent / name
    out.mkdir()
    gguf_source.convert(path, out)
    return out


def renamed(path: Path, arch: str) -> Path:
    """Writes another architecture's name over "llama" in the key that names it."""
    key = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8)
    old, new = (struct.pack("<Q", len(name)) + name.encode() for name in ("llama", arch))
    path.write_bytes(path.read_bytes().replace(key + old, key + new))
    return path
