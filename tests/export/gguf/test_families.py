"""Every family as a small random model: transformers against llama.cpp on the same ids."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.export.gguf import write as export
from lighten.facts import ModelFacts
from lighten.model.gguf.family import places
from lighten.model.gguf.table import FAMILIES
from lighten.model.gguf.turns import Model
from tests.conftest import byte_level, write_tokenizer
from tests.export.gguf.test_write import logits_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    "partial_rotary_factor": 0.75,
}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases-apart": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "falcon3": ("Llama", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1000042.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied-yarn": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma2-other-scale": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-pattern": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 16}),
    "gemma3-scaled": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 50,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "gemma3-pattern": (
        "Gemma3Text",
        {"head_dim": 32, "sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
    ),
    "phi3": ("Phi3", {}),
    "phi3-tied-partial": (
        "Phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope-short-text": (
        "Phi3",
        {"original_max_position_embeddings": 512, "max_position_embeddings": 1024, "rope_parameters": LONG},
    ),
    "phi3-longrope-long-text": ("Phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONG}),
    "smollm3": ("SmolLM3", {}),
    "smollm3-untied-yarn": ("SmolLM3", {"tie_word_embeddings": False, "rope_parameters": YARN}),
    "olmo2": ("Olmo2", {}),
    "olmo2-tied-yarn": ("Olmo2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "granite": ("Granite", GRANITE),
    "granite-tied-biases-llama3": (
        "Granite",
        {**GRANITE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "granite-linear": ("Granite", {**GRANITE, "rope_parameters": LINEAR}),
}


def randomize(model: torch.nn.Module) -> None:
    """Gives norms and biases values that cannot be taken for their defaults."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            usual = float(parameter.mean().round()) if name.endswith("norm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean=usual, std=0.3)


@cache
def made(folder: Path, case: str) -> Path:
    source = folder / case
    source.mkdir()
    vocab = write_tokenizer(source, byte_level("qwen2"))
    name, settings = CASES[case]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(
        **{**SIZES, "vocab_size": vocab + 7, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    )
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    randomize(model)
    model.save_pretrained(source)
    return source


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def compare(source: Path, file: Path) -> tuple[float, float]:
    """Returns the smallest cosine of the logits of 64 positions, and how many have the same most likely token.

    Tokens count as the same whose logits are nearer than float32 tells them apart: 0.01 % of the logits' spread, and
    1 % for Gemma, whose GELU llama.cpp looks up in a table of 16 bits.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    found = logits_of(file, ids[0].tolist())
    cosine = (found * expected).sum(-1) / (np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1))
    chosen = np.take_along_axis(expected, found.argmax(-1)[:, None], -1)[:, 0]
    tie = 1e-2 if "gelu" in str(getattr(model.config, "hidden_activation", "")) else 1e-4
    return float(cosine.min()), float((expected.max(-1) - chosen <= tie * expected.std(-1)).mean())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(folder: Path, tmp_path: Path, case: str) -> None:
    source = made(folder, case)
    warnings = export.write(source, tmp_path / "m.gguf", "F32")
    assert len(warnings) == ("longrope" in case)
    cosine, same = compare(source, tmp_path / "m.gguf")
    assert cosine > 0.999999
    assert same == 1.0


UNKNOWN = {
    # the converter joins them, llama.cpp reads both forms
    "Gemma4ForCausalLM": {"blk.1.ffn_gate_exps", "blk.1.ffn_up_exps"},
}
"""Names that llama.cpp's loader knows and the package gguf does not."""
ANY = ModelFacts("any", 2, 64, 96, 4, 2, 16, 100, False)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_are_those_of_the_architecture(architecture: str) -> None:
    family = FAMILIES[architecture]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    known = {gguf.TENSOR_NAMES[tensor].format(bid=1) for tensor in gguf.MODEL_TENSORS[arch]}
    config = {"layers_block_type": ["moe"], "num_local_experts": 4, "hidden_size_per_layer_input": 8}
    names = {name for place in places(family, Model({**config, "enable_moe_block": True}, ANY)) for name in place.names}
    found = {re.sub(r"\.(weight|bias|scale)$", "", name).replace("blk.0", "blk.1") for name in names}
    assert found - known <= UNKNOWN.get(architecture, set())
    assert family.head != "tied" or "output.weight" not in names


def changed(folder: Path, case: str, to: Path, **config: Any) -> Path:
    source = shutil.copytree(made(folder, case), to)
    held = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**held, **config}))
    return source


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gemma2", {"tie_word_embeddings": False}, "no place for another"),
        ("gemma2", {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
        ("gemma2", {"hidden_activation": "silu"}, "computes gelu_pytorch_tanh"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping, which"),
        ("gemma3", {"use_bidirectional_attention": True}, "not a causal"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layers"),
        ("olmo2", {"head_dim": 32}, "the heads together are 128 wide"),
        ("qwen3", {"rope_parameters": LLAMA3}, "known are default, linear and yarn"),
        ("phi3", {"rope_parameters": {**LONG, "long_factor": [1.0]}}, "1 numbers as long_factor, and 6"),
        ("llama", {"architectures": ["PhiForCausalLM"]}, "does not know PhiForCausalLM; it knows LlamaFor.*Granite"),
    ],
)
def test_refuses_what_llama_cpp_lacks(
    folder: Path, tmp_path: Path, case: str, change: dict[str, Any], message: str
) -> None:
    source = changed(folder, case, tmp_path / "hf", **change)
    with pytest.raises(RequestError, match=message):
        export.write(source, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refuses_a_bias_that_llama_cpp_does_not_add(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(made(folder, "qwen3"), tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.ones(64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RequestError, match=r"qwen3 has no place for the tensor model\.layers\.1\.self_attn\.o_proj\.bias"
    ):
        export.write(source, tmp_path / "m.gguf")


def test_older_gemma3_configs(folder: Path, tmp_path: Path) -> None:
    older = {
        "rope_parameters": None,
        "rope_theta": 5e5,
        "rope_local_base_freq": 123.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": None,
    }
    source = changed(folder, "gemma3", tmp_path / "hf", **older)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "tie_word_embeddings"}))
    export.write(source, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    expected = {"rope.freq_base": 5e5, "rope.freq_base_swa": 123.0, "rope.scaling.factor": 8.0}
    assert {key: fields[f"gemma3.{key}"].contents() for key in expected} == expected
    assert "gemma3.attention.sliding_window_pattern" not in fields


def test_gemma3_says_by_a_number_which_layers_see_all(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, "gemma3", tmp_path / "p", layer_types=None, sliding_window_pattern=2)
    export.write(source, tmp_path / "p.gguf")
    cosine, same = compare(source, tmp_path / "p.gguf")
    assert cosine > 0.999999 and same == 1


def test_a_config_without_what_it_needs_is_one_message(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, "llama", tmp_path / "c", rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
    with pytest.raises(Failure, match=r"config\.json is damaged \(KeyError: 'factor'\)"):
        export.write(source, tmp_path / "c.gguf")
    source = changed(folder, "llama", tmp_path / "t")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(Failure, match=r"tokenizer\.json is damaged"):
        export.write(source, tmp_path / "t.gguf")


def test_a_tokenizer_that_strips_is_named_so(folder: Path) -> None:
    from lighten.export.gguf.tokenizer import read_vocabulary

    found = read_vocabulary(made(folder, "phi3"), 10**6, {})
    facts = export.Draft(made(folder, "phi3")).facts
    found.strips = True
    assert export._name({"name": "my-chat"}, facts, found) == "my-chat (Phi-3)"
    assert export._name({"name": "Phi3-mini"}, facts, found) == "Phi3-mini"


def test_a_name_does_not_make_llama_cpp_strip(folder: Path, tmp_path: Path) -> None:
    export.write(made(folder, "phi3"), tmp_path / "m.gguf", about={"name": "My Phi-3-mini"})
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "My Phi_3-mini"
    logits_of(tmp_path / "m.gguf", [1, 2, 3])
