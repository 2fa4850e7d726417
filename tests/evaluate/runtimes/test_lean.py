"""Weights of 16 bits computed with in float32: the same numbers as the float32 model's, without its memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.lean import open_lean, stored_short
from tests.evaluate.conftest import Tiny


@pytest.mark.parametrize("family", ["llama-tied", "llama-bias", "yarn-factor", "qwen2"])
def test_the_logits_are_those_of_the_float32_model(tiny: Tiny, family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16)
    assert stored_short(model) == "bfloat16"
    lean, plain, ids = open_lean(model, "bfloat16"), open_runtime(model), np.arange(1, 70)
    expected = plain.logits(ids)
    for _ in range(2):  # the weights are put back after a batch
        np.testing.assert_allclose(lean.logits(ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert {weight.dtype for weight in lean.model.parameters()} == {torch.bfloat16}
    assert lean.dtype == "float32"


def test_other_types_are_opened_as_ever(tiny: Tiny, tmp_path: Path) -> None:
    assert stored_short(tiny("llama", dtype=torch.float16)) == "float16"
    assert stored_short(tiny("llama")) is None
    mixed = Path(shutil.copytree(tiny("llama", dtype=torch.bfloat16), tmp_path / "mixed"))
    weights = load_file(mixed / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, mixed / "model.safetensors", {"format": "pt"})
    assert stored_short(mixed) is None
