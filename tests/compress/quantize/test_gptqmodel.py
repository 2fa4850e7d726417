"""What GPTQModel, the loader that transformers uses, reads from our checkpoints: the weights that we meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lighten.compress.calibrate.sweep import Sweep
from lighten.model.quantized.gptq import Gptq
from lighten.pipeline.steps import open_step
from lighten.process.isolate import run_isolated
from lighten.step import Context
from lighten.store.artifact import Artifact


def largest_difference(payload: dict[str, Any], report: Callable[..., None]) -> dict[str, float]:
    """Loads checkpoints through transformers and GPTQModel; returns how far their weights are from ours."""
    import os

    os.environ["GPTQMODEL_CPU_WORKERS"] = "3"
    from transformers import AutoModelForCausalLM, GPTQConfig

    found = {}
    for folder in map(Path, payload["folders"]):
        bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
        reader = GPTQConfig(bits=bits, backend="torch")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=reader)
        tensors = load_file(folder / "model.safetensors")
        worst = 0.0
        quantized = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
        assert len(quantized) == 14, sorted(quantized)
        for name, module in quantized.items():
            parts = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
            ours = Gptq({"bits": bits}).weight(parts)
            theirs = type(module).dequantize_weight(module).T.float()
            worst = max(worst, float(((ours - theirs).abs() / ours.abs().max()).max()))
        found[folder.name] = worst
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_width_of_code_is_read_as_written(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = Artifact(tiny(family, dtype=torch.bfloat16), {"key": "x", "format": "hf"})
    grams = tmp_path / "grams"
    grams.mkdir()
    Sweep(data="builtin", samples=4, length=32).run(source, grams, Context())
    settings = [{"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)]
    settings += [{"bits": 4, "group_size": -1}, {"bits": 4, "group_size": 64, "desc_act": True}]
    settings += [{"bits": bits, "group_size": 64, "sym": False} for bits in (4, 8)]
    folders = []
    for number, each in enumerate(settings):
        folder = tmp_path / str(number)
        folder.mkdir()
        open_step("quantize", each).run(source, folder, Context(grams=grams))
        folders.append(str(folder))
    found = run_isolated("tests.compress.quantize.test_gptqmodel:largest_difference", {"folders": folders}).value
    assert len(found) == len(settings)
    assert max(found.values()) < 1e-3, found  # float16 arithmetic of theirs
