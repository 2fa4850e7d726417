"""Random models of further families: llama.cpp's logits, and the way back. Experts, convolutions, states, windows.

`make gguf-families` runs all cases; otherwise those of RUN.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.activations import GELUTanh

from lighten.errors import RequestError
from lighten.export.gguf import write as export
from tests.export.gguf.test_back import same_again
from tests.export.gguf.test_write import logits_of
from tests.families import models

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
SHARED = {"num_kv_shared_layers": 0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "olmo3": ("olmo3", {}, {}),
    "ministral3": ("ministral3", {}, {"sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", {}, {"norm_topk_prob": True}),
    "gpt-oss": ("gpt_oss", {}, {"rope_parameters": YARN}),
    "glm4-moe": ("glm4_moe", {}, {}),
    "minimax-m2": ("minimax_m2", {}, {}),
    "llama4": ("llama4_text", {}, {"attention_chunk_size": 8192}),
    "deepseek-v2": ("deepseek_v2", {}, {}),
    "deepseek-v2-lite": ("deepseek_v2", {"q_lora_rank": None}, {}),
    "deepseek-v3": ("deepseek_v3", {}, {}),
    "deepseek-v3-groups": (
        "deepseek_v3",
        {"n_routed_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
        {},
    ),
    "lfm2": ("lfm2", {}, {}),
    "lfm2-moe": ("lfm2_moe", {}, {}),
    "granite-hybrid": ("granitemoehybrid", {}, {}),
    "granite-hybrid-dense": ("granitemoehybrid", {"num_local_experts": 0}, {}),
    "nemotron-h": ("nemotron_h", {}, {}),
    "nemotron-h-dense": ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}, {}),
    "nemotron-h-latent": ("nemotron_h", {"moe_latent_size": 32}, {}),
    "qwen3.5": ("qwen3_5_text", {}, {}),
    "qwen3.5-moe": ("qwen3_5_moe_text", {}, {}),
    "gemma4": ("gemma4_text", {}, {}),
    "gemma4-moe": (
        "gemma4_text",
        {**SHARED, "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
        {},
    ),
    "gemma4-keys-are-values": (
        "gemma4_text",
        {**SHARED, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {},
    ),
}
"""Family, settings of the model, and what is changed in its config.json so that llama.cpp can run it."""
RUN = ("gpt-oss", "llama4", "deepseek-v3-groups", "granite-hybrid", "qwen3.5-moe", "gemma4", "gemma4-moe", "lfm2-moe")
"""Cases of every run: each has something that no other has."""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def make(case: str) -> Path:
        family, settings, changes = CASES[case]
        monkeypatch.setitem(models.OWN, family, {**models.OWN.get(family, {}), **settings})
        (folder := tmp_path / "model").mkdir()
        models.make(family, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return make


@pytest.fixture
def rounded_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes GELU as ggml does: from a table with 16 bits for an input and an output."""
    exact = GELUTanh.forward
    monkeypatch.setattr(GELUTanh, "forward", lambda self, x: exact(self, x.half().float()).half().float())


def divergence(source: Path, file: Path) -> float:
    """Returns the largest divergence of llama.cpp's predictions from transformers', of 64 positions, in nats."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.eval()(ids).logits[0].log_softmax(-1)
    found = torch.from_numpy(np.asarray(logits_of(file, ids[0].tolist()))).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).max())


@pytest.mark.usefixtures("rounded_gelu")
@pytest.mark.parametrize("case", CASES if os.environ.get("GGUF_FAMILIES") else RUN)
def test_a_family_goes_to_llama_cpp_and_back(made: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    source = made(case)
    assert export.write(source, tmp_path / "direct.gguf", "F32") == []
    assert divergence(source, tmp_path / "direct.gguf") < 2e-6
    same_again(source, tmp_path)


def test_what_predicts_further_tokens_is_left_out_by_name(made: Callable[[str], Path], tmp_path: Path) -> None:
    source = made("qwen3.5")
    tensors = load_file(source / "model.safetensors")
    for name in ("mtp.fc.weight", "model.layers.4.self_attn.q_proj.weight"):
        tensors[name] = torch.ones(4, 4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (warning,) = export.write(source, tmp_path / "m.gguf")
    assert "2 tensors that llama.cpp has no use for here are left out: " in warning
    assert "mtp.fc.weight" in warning and "model.layers.4.self_attn.q_proj.weight" in warning
    tensors["model.layers.3.self_attn.sinks"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"no place for the tensor model\.layers\.3\.self_attn\.sinks"):
        export.write(source, tmp_path / "m.gguf")
