"""Quantized models of other families than Llama's, opened by the loaders of their formats, score as ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lighten.evaluate.runtimes.torch import TorchRuntime
from lighten.model import whole
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3_text", {"method": "rtn", "bits": 4, "group_size": 32}, "gptqmodel"),
    ("llava", {"method": "rtn", "bits": 8, "group_size": 32, "ignore": ["*.0.*"]}, "compressed-tensors"),
    ("gpt2", {"method": "rtn", "bits": 4, "group_size": 32}, "unpacked by lighten"),
]


@pytest.mark.parametrize(("family", "settings", "loader"), CASES, ids=[each[0] for each in CASES])
def test_a_loader_opens_what_was_written(family: str, settings: dict[str, Any], loader: str, tmp_path: Path) -> None:
    (model := tmp_path / "model").mkdir()
    (out := tmp_path / "out").mkdir()
    make(family, model, torch.float16)
    open_step("quantize", settings).run(Artifact(model, {"key": "x", "format": "hf"}), out, Context())
    runtime = TorchRuntime(out, "cpu", None)
    assert loader in runtime.detail
    ids = np.arange(5, 37)
    with torch.no_grad():
        wanted = whole.load(out, torch.float32)(torch.from_numpy(ids)[None], use_cache=False).logits[0]
    assert np.abs(runtime.logits(ids) - wanted.numpy()).max() < 1e-4
