"""The real 135M model on MLX."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import lighten

mx: Any = pytest.importorskip("mlx.core")
mlx_lm: Any = pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.real


def test_it_is_the_same_model_on_mlx_and_answers(tmp_path: Path) -> None:
    asked = ("export", "demo:smollm2-135m", "--format", "mlx", "--parity", "tokens=64", "-o", "out", "--json")
    done = lighten(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parity = json.loads(done.stdout)["facts"]["parity"]
    assert abs(parity["perplexity_change"]) < 0.0005 and parity["top1_agreement"] > 0.99
    assert (parity["strings_differ"], parity["chat_template"]) == (0, "same")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    model.set_dtype(mx.float32)  # a CPU takes long for 16 bits
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt="The capital of France is", max_tokens=3)
