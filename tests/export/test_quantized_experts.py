"""Quantized models with a matrix for each expert are exported as `evaluate` reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.model import weight_checks, whole
from lighten.model.source import find
from lighten.pipeline.steps import open_step
from lighten.step import Context, silent
from lighten.store.artifact import Artifact
from tests.conftest import byte_level, write_tokenizer
from tests.export.gguf.test_write import logits_of
from tests.families.models import config_of

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "rtn", "bits": 4, "group_size": 32},
    "compressed-tensors": {"method": "fp8"},
}
IDS = list(range(5, 37))


def quantized(form: str, folder: Path) -> Path:
    """Writes a quantized gpt-oss of one layer. transformers stores its experts in one tensor."""
    (source := folder / "source").mkdir()
    (out := folder / "quantized").mkdir()
    vocab = write_tokenizer(source, byte_level("gpt-2")) + 3
    rope = {"rope_type": "default", "rope_theta": 1e4}  # llama.cpp rounds the borders of YaRN's ramp
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of("gpt_oss", vocab, {"num_hidden_layers": 1, "layer_types": None, "rope_parameters": rope})
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(source)
    facts = open_step("quantize", METHODS[form]).run(Artifact(source, {"key": "x", "format": "hf"}), out, Context())
    assert facts["format"] == form
    return out


def exported(model: Path, form: str, out: Path, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    """Exports what the commands accept as a source; returns facts and warnings."""
    assert find(str(model)).form == "directory"
    out.mkdir()
    context = Context()
    return open_step("export", settings).run(
        Artifact(model, {"key": "x", "format": form}), out, context
    ), context.warnings


def expected(path: Path) -> Any:
    with torch.no_grad():
        return whole.load(path, torch.float32)(torch.tensor([IDS]), use_cache=False).logits[0].numpy()


def test_a_file_for_llama_cpp(tmp_path: Path) -> None:
    model = quantized("gptq", tmp_path)
    _, warnings = exported(model, "gptq", tmp_path / "out", format="gguf", type="F32")
    wanted = expected(model)
    assert np.abs(logits_of(tmp_path / "out" / "model-F32.gguf", IDS) - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert any("a gptq checkpoint: its rounding is in the file" in each for each in warnings)


def test_a_plain_graph(tmp_path: Path) -> None:
    form = "compressed-tensors"
    model = quantized(form, tmp_path)
    facts, warnings = exported(model, form, out := tmp_path / "out", format="onnx", graph="plain")
    assert facts["unpacked"] == form
    assert np.abs(open_runtime(out).logits(np.array(IDS)) - expected(model)).max() < 1e-3
    assert "quantization_config" not in (out / "config.json").read_text()
    assert any("were unpacked" in each for each in warnings)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    """Matrices of experts count as the tensor of all only if every one of them is there, in its shape."""
    model = quantized("gptq", tmp_path)
    assert weight_checks.check({"path": str(model), "name": "M"}, silent)["surplus"] == []
    file = model / "model.safetensors"
    tensors = load_file(file)
    gone = [name for name in tensors if ".experts.2.down_proj." in name]
    assert gone
    save_file({name: each for name, each in tensors.items() if name not in gone}, file, {"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks 1 of the .*experts\.down_proj"):
        weight_checks.check({"path": str(model), "name": "M"}, silent)
