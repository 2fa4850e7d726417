"""gpt-oss as it is published, with experts in MXFP4, becomes a file with the same values in the same 4 bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lighten.export.gguf import quantize as gguf_quantize
from lighten.export.gguf import write as export
from lighten.export.gguf.settings import Gguf
from lighten.model.gguf_source import convert
from lighten.model.quantized.mxfp4 import unpack
from lighten.model.unpacked import open_checkpoint
from lighten.model.weight_checks import check
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.gguf.test_every_family import made
from tests.export.gguf.test_write import logits_of

__all__ = ["made"]
EXPERTS = ("gate_up_proj", "down_proj")


def packed(experts: int, rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random codes and exponents; blocks of zeros and blocks without large codes are among them."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
    blocks[0, 0] = 0
    blocks[0, 1] &= 0x11  # zeros and halves only
    return blocks, torch.randint(115, 124, blocks.shape[:3], generator=random, dtype=torch.uint8)


@pytest.fixture
def source(made: Callable[[str], Path]) -> Path:
    folder = made("gpt-oss")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        for seed, name in enumerate(EXPERTS):
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            experts, columns, rows = tensors.pop(whole).shape
            tensors[f"{whole}_blocks"], tensors[f"{whole}_scales"] = packed(experts, rows, columns, 10 * layer + seed)
    kept = {name: each if each.dtype == torch.uint8 else each.bfloat16() for name, each in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return folder


def test_values_are_those_of_transformers() -> None:
    blocks, scales = packed(3, 8, 64, 1)
    assert torch.equal(unpack(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def test_a_published_model_keeps_its_bits(source: Path, tmp_path: Path) -> None:
    assert check({"path": source, "name": "x"}, lambda *_: None) == {"surplus": [], "known": [], "unchecked": None}
    step: Any = Gguf(format="gguf", type="MXFP4")
    checkpoint = open_checkpoint(source)
    step.check_source("mxfp4", checkpoint.facts)
    export.write(source, tmp_path / "p.gguf")
    gguf_quantize.quantize(tmp_path / "p.gguf", tmp_path / "m.gguf", "MXFP4")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "p.gguf").tensors}
    for kind in ("gate", "up", "down"):
        name = f"blk.2.ffn_{kind}_exps.weight"
        assert tensors[name].tensor_type.name == "MXFP4" and exact[name].tensor_type.name == "BF16"
        values = dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.array_equal(values, dequantize(exact[name].data, exact[name].tensor_type))
    assert logits_of(tmp_path / "m.gguf", [5, 6, 7]).std() > 0
    (back := tmp_path / "back").mkdir()
    convert(tmp_path / "m.gguf", back)  # a file in MXFP4 is a source, too
    read = open_checkpoint(back)
    for name in EXPERTS:
        whole = f"model.layers.3.mlp.experts.{name}"
        assert torch.equal(read.tensor(whole), checkpoint.tensor(whole))


def test_a_model_without_experts_is_in_8_bits(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp gives MXFP4 to experts alone: the prediction and a warning say so."""
    step, context = Gguf(format="gguf", type="MXFP4"), Context()
    facts = step.run(Artifact(tiny(), {"key": "x", "format": "hf"}), tmp_path, context)
    assert facts["tensor_types"].keys() == {"F32", "Q8_0"}
    assert any("no experts" in each for each in context.warnings)
    predicted = step.predict(open_checkpoint(tiny()).facts, 0).disk_bytes
    weights = sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "model-MXFP4.gguf").tensors)
    assert predicted == pytest.approx(weights, rel=0.02)
