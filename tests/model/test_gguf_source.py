import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lighten.errors import Failure, LightenError, RequestError
from lighten.evaluate.runtimes.choose import find_opener
from lighten.facts import ModelFacts
from lighten.model import gguf_header, gguf_source
from lighten.model.formats import recognise
from lighten.model.gguf.config import llama3_divisors
from lighten.model.source import find
from lighten.model.tokenizer_table import TABLE

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = 2, 64, 4, 2, 96, 400
Make = Callable[..., Path]


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
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
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


def test_every_truncation_is_named(make: Make) -> None:
    path = make()
    whole = path.read_bytes()
    header = gguf_header.read_header(path)
    last = max(header.tensors.values(), key=lambda tensor: tensor.start)
    path.write_bytes(whole[: last.start + last.size - 1])
    expected = (
        rf"is cut short: tensor {last.name} needs bytes up to {last.start + last.size}, .* {last.start + last.size - 1}"
    )
    with pytest.raises(Failure, match=f"{expected}; fetch it again"):
        gguf_source.check(path)
    for size in (4, 9, 20, 24, 100, 3000, len(whole) // 4):
        path.write_bytes(whole[:size])
        with pytest.raises(Failure, match=f"is cut short: .*the file has {size}; fetch it again"):
            gguf_source.check(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damage_never_shows_a_traceback(data: st.DataObject) -> None:
    whole = bytearray(damaged_source())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, 1500))] = data.draw(st.integers(0, 255))
    path = damaged_path().with_name("damaged.gguf")
    path.write_bytes(whole)
    try:
        gguf_source.inspect(path)
    except LightenError as error:
        assert str(path) in str(error)


@cache
def damaged_path() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp()) / "m.gguf"


@cache
def damaged_source() -> bytes:
    writer = gguf.GGUFWriter(damaged_path(), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b", "c"])
    for index in range(20):
        writer.add_tensor(f"blk.{index}.attn_q.weight", np.zeros((2, 32), np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return damaged_path().read_bytes()


def test_not_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        gguf_source.check(tmp_path / "none.gguf")
    with pytest.raises(RequestError, match="no such file"):
        gguf_source.check(tmp_path)
    for content in (b"", b"GG", b"PK\x03\x04 not this"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(RequestError, match="not a GGUF file"):
            gguf_source.check(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(RequestError, match="version 1 or big-endian"):
        gguf_source.check(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope_dimension_count": 8}, "rotates only a part"),
        ({"head_count_kv": [2, 1]}, "differs from layer to layer"),
    ],
)
def test_unsupported_models(make: Make, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gguf_source.inspect(make(keys=keys))


def test_unsupported_architecture(make: Make) -> None:
    with pytest.raises(
        RequestError, match=r"'falcon', which can be measured but not changed.*llama, qwen2, qwen3, .*Mistral"
    ):
        gguf_source.check(renamed(make(), "falcon"))


def renamed(path: Path, arch: str) -> Path:
    """Writes another architecture's name over "llama" in the key that names it."""
    key = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8)
    old, new = (struct.pack("<Q", len(name)) + name.encode() for name in ("llama", arch))
    path.write_bytes(path.read_bytes().replace(key + old, key + new))
    return path


def test_unknown_tokenizers(make: Make) -> None:
    with pytest.raises(RequestError, match="'mystery', which lighten does not know; known: gpt-2, smollm"):
        converted(make(pre="mystery"))
    with pytest.raises(RequestError, match="model 'bert'; lighten reads gpt2, llama and gemma4"):
        converted(make(name="b.gguf", keys={"tokenizer_model": "bert"}), "bert")


def test_unknown_tensors(make: Make) -> None:
    def add(held: dict[str, np.ndarray[Any, Any]]) -> None:
        held["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)

    with pytest.raises(RequestError, match=r"has no tensor blk\.0\.attn_q_norm\.weight"):
        converted(make(change=add))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_named(make: Make, value: float) -> None:
    def spoil(held: dict[str, np.ndarray[Any, Any]]) -> None:
        held["blk.1.ffn_up.weight"][2, 3] = value

    with pytest.raises(Failure, match=r"tensor blk\.1\.ffn_up\.weight holds NaN or infinity"):
        converted(make(quantized="F32", change=spoil))


def test_without_the_gguf_package(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match=r"pip install 'lighten\[gguf\]'"):
        gguf_source.check(path)


def no_model(folder: Path, kind: str, **keys: str) -> Path:
    writer = gguf.GGUFWriter(folder / kind, "llama" if kind != "imatrix" else kind)
    writer.add_type(kind)
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / kind


def test_files_that_are_no_models_are_told_by_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"adapter is an adapter of a model of the kind llama: merge it"):
        gguf_source.measurable(no_model(tmp_path, "adapter"))
    named = no_model(tmp_path, "adapter", general__base_model__0__repo_url="https://huggingface.co/org/base")
    with pytest.raises(RequestError, match=r"an adapter of https://huggingface.co/org/base"):
        find(str(named))
    with pytest.raises(RequestError, match=r"an importance matrix, and no model"):
        find(str(no_model(tmp_path, "imatrix")))
    vocabulary = gguf.GGUFWriter(tmp_path / "words.gguf", "llama")
    vocabulary.write_header_to_file()
    vocabulary.write_kv_data_to_file()
    vocabulary.close()
    with pytest.raises(RequestError, match="no weights, only a vocabulary"):
        find(str(tmp_path / "words.gguf"))


def test_a_file_is_recognised_by_its_content(make: Make, tmp_path: Path) -> None:
    file = make(name="sha256-abab")
    (tmp_path / "text").write_text("GGU")
    assert gguf_header.is_gguf(file) and not gguf_header.is_gguf(tmp_path / "text")
    assert not gguf_header.is_gguf(tmp_path)
    assert find(str(file)).form == "gguf"
    assert find_opener(file)[1] == file
    assert recognise(file) == (file, "gguf", None)


def test_a_file_without_a_pre_tokenizer_is_measured_with_a_warning_and_not_converted(make: Make) -> None:
    assert gguf_source.doubts(make()) == []
    path = make(pre="")
    assert "does not name its pre-tokenizer" in gguf_source.doubts(path)[0]
    assert gguf_source.measurable(path).vocab == VOCAB
    with pytest.raises(RequestError, match="does not name its pre-tokenizer"):
        gguf_source.check(path)


def test_sizes_of_any_architecture_are_told_for_measuring(make: Make) -> None:
    known = make()
    assert replace(gguf_source.measurable(known), counted=None) == gguf_source.inspect(known)
    foreign = gguf_source.measurable(renamed(known, "falcon"))
    assert foreign.architecture == "falcon"
    assert foreign.counted == gguf_source.inspect(make(name="again.gguf")).params
