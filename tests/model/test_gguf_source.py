"""Models from GGUF files."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model import gguf_source
from lighten.model.gguf.config import llama3_divisors
from lighten.model.tokenizer_table import TABLE
from tests.model.gguf_files import (
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    Make,
    converted,
    make,
    tensors,
)

__all__ = ["make"]


def test_facts_without_torch(make: Make) -> None:
    path = make(tied=False)
    expected = ModelFacts("LlamaForCausalLM", LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HIDDEN // HEADS, VOCAB, False)
    assert gguf_source.inspect(path) == replace(expected, context=128)
    script = (
        f"import sys, pathlib; from lighten.model.gguf_source import check; check(pathlib.Path({str(path)!r})); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_converts_weights_and_says_whose_they_are(make: Make, arch: str) -> None:
    path = make(arch, pre="qwen2" if arch == "qwen2" else "smollm", tied=False, quantized="F32")
    out = path.parent / "hf"
    out.mkdir()
    steps: list[tuple[int, int, str]] = []
    assert gguf_source.convert(path, out, lambda *step: steps.append(step)) == {"licence": "mit", "name": "Tiny"}
    original, found = tensors(arch, False, np.random.default_rng(0)), load_file(out / "model.safetensors")
    assert len(found) == len(original) == steps[-1][0] == steps[-1][1]
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(original[name]).to(torch.bfloat16)

    assert torch.equal(found["lm_head.weight"], stored("output.weight"))
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], stored("blk.1.ffn_down.weight"))
    k = found["model.layers.0.self_attn.k_proj.weight"]
    if arch == "qwen2":
        assert torch.equal(k, stored("blk.0.attn_k.weight"))
        assert torch.equal(found["model.layers.0.self_attn.k_proj.bias"], stored("blk.0.attn_k.bias"))
    else:
        # Row 2 i of a head in llama.cpp is row i here, and row 2 i + 1 is row i + head_dim / 2.
        size = HIDDEN // HEADS
        order = [head * size + row for head in range(KV_HEADS) for row in [*range(0, size, 2), *range(1, size, 2)]]
        assert torch.equal(k, stored("blk.0.attn_k.weight")[order])


def test_transformers_loads_the_directory(make: Make) -> None:
    out = converted(make())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 5e4
    assert model.config.rms_norm_eps == 1e-5
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCAB)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}"
    ids = tokenizer("<|im_start|>def f12<think>(x)<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert {"1", "2"} <= {tokenizer.decode([index]) for index in ids}
    assert tokenizer.decode(ids, skip_special_tokens=True) == "def f12<think>(x)"


def test_two_conversions_give_the_same_bytes(make: Make) -> None:
    path = make()
    hashes = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in converted(path, name).iterdir()}
        for name in ("a", "b")
    ]
    assert hashes[0] == hashes[1]
    assert set(hashes[0]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("pre", [*TABLE, "llama3", "deepseek-r1-qwen", "starcoder"])
def test_the_pre_tokenizer_and_its_defaults_come_back(make: Make, pre: str) -> None:
    out = converted(make(pre=pre))
    entry = next(entry for name, entry in TABLE.items() if pre == name or pre in entry.aliases)
    written = json.loads((out / "tokenizer.json").read_text())
    assert written["pre_tokenizer"] == entry.json()
    ids = AutoTokenizer.from_pretrained(out)("x y").input_ids
    assert (ids[0] == 1) is entry.add_bos
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("x y").ids == ids


@pytest.mark.parametrize("bos", [True, False])
def test_what_the_file_says_of_bos_and_eos_wins(make: Make, bos: bool) -> None:
    out = converted(make(pre="llama-bpe", keys={"add_bos_token": bos, "add_eos_token": True}))
    ids = AutoTokenizer.from_pretrained(out)("x").input_ids
    assert (ids[0] == 1, ids[-1] == 2) == (bos, True)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling(make: Make, kind: str) -> None:
    keys = {
        "rope_scaling_type": gguf.RopeScalingType(kind),
        "rope_scaling_factor": 4.0,
        "rope_scaling_orig_ctx_len": 32,
    }
    rope = json.loads((converted(make(keys=keys)) / "config.json").read_text())["rope_parameters"]
    expected = {"rope_theta": 5e4, "rope_type": kind, "factor": 4.0}
    assert rope == (expected | {"original_max_position_embeddings": 32} if kind == "yarn" else expected)


def test_llama3_rope_is_recognised(make: Make) -> None:
    wanted = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    divisors = llama3_divisors(5e4, HIDDEN // HEADS, wanted).numpy()
    out = converted(make(change=lambda held: held.update({"rope_freqs.weight": divisors})))
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert rope == {"rope_theta": 5e4, "rope_type": "llama3", **wanted}
    odd = np.geomspace(1, 8, divisors.size).astype(np.float32)
    path = make(name="odd.gguf", change=lambda held: held.update({"rope_freqs.weight": odd}))
    with pytest.raises(RequestError, match="not the llama3 scaling"):
        converted(path, "odd")


def test_llama3_divisors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **rope},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    assert torch.allclose(plain / llama3_divisors(5e5, 128, rope), scaled, rtol=1e-5)


def test_sentencepiece_merges_follow_the_scores(tmp_path: Path) -> None:
    from lighten.model.tokenizer_table import tokenizer_json

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁ab", "ab", "▁a", "a", "b", "▁"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -3.0, -2.0, -9.0, -9.0, -9.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    made = tokenizer_json(fields)
    assert made["model"]["merges"] == [["▁a", "b"], ["▁", "ab"], ["▁", "a"], ["a", "b"]]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert tokenizer.encode("ab abz").tokens == ["<s>", "▁ab", "▁ab", "<0x7A>"]
    assert tokenizer.decode(tokenizer.encode("ab abz").ids) == "ab abz"
    bare = Tokenizer.from_str(json.dumps(tokenizer_json(fields | {"tokenizer.ggml.add_space_prefix": False})))
    assert bare.encode("ab").tokens == ["<s>", "ab"]


def test_merges_of_gemma_4_are_in_the_file() -> None:
    from lighten.model.tokenizer_table import tokenizer_json

    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "\n",
        "\n\n",
        "▁a",
        "▁ab",
    ]
    fields = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3, 3, 3, *[6] * 256, *[1] * 7],
        "tokenizer.ggml.merges": ["▁ a", "▁a b", "\n \n"],
        "tokenizer.ggml.bos_token_id": 2,
    }
    made = tokenizer_json(fields)
    assert made["model"]["merges"] == [["▁", "a"], ["▁a", "b"], ["\n", "\n"]]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert tokenizer.encode("b ab\n\nz").tokens == ["<bos>", "b", "▁ab", "\n\n", "<0x7A>"]
    assert tokenizer.decode(tokenizer.encode("b ab\n\nz").ids) == "b ab\n\nz"
