"""Random models of further families: llama.cpp's logits, and the way back. Experts, convolutions, windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.export.gguf import write as export
from tests.export.gguf.test_back import same_again
from tests.export.gguf.test_write import logits_of
from tests.families.models import make

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
CASES: dict[str, dict[str, Any]] = {
    "olmo3": {},
    "ministral3": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_oss": {"rope_parameters": YARN},
    "glm4_moe": {},
    "minimax_m2": {},
    "lfm2": {},
    "lfm2_moe": {},
}
"""Families, and what is changed in their config.json so that llama.cpp can run them."""


def made(family: str, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    make(family, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CASES.get(family, {}), **changes}))
    return folder


def divergence(source: Path, file: Path) -> float:
    """Returns the largest divergence of llama.cpp's predictions from transformers', of 64 positions, in nats."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.eval()(ids).logits[0].log_softmax(-1)
    found = torch.from_numpy(np.asarray(logits_of(file, ids[0].tolist()))).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).max())


@pytest.mark.parametrize("family", CASES)
def test_a_family_goes_to_llama_cpp_and_back(family: str, tmp_path: Path) -> None:
    source = made(family, tmp_path / "model")
    assert export.write(source, tmp_path / "direct.gguf", "F32") == []
    assert divergence(source, tmp_path / "direct.gguf") < 2e-6
    same_again(source, tmp_path)
