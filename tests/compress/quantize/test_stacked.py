"""gpt-oss in its own form of MXFP4: what was rounded is what lighten and transformers read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lighten.compress.quantize.float_grid import Mxfp4Scales, rounded, usual
from lighten.errors import RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.model.checkpoint import Checkpoint
from lighten.model.unpacked import open_checkpoint
from lighten.model.weight_checks import check
from lighten.pipeline.steps import open_step
from lighten.step import Context, silent
from lighten.store.artifact import Artifact
from tests.conftest import byte_level, write_tokenizer
from tests.families.models import config_of

OWN = {"method": "mxfp4", "form": "gpt-oss"}
EXPERTS = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    vocab = write_tokenizer(folder, byte_level("gpt-2")) + 3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("gpt_oss", vocab, {"num_hidden_layers": 1, "layer_types": None}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_experts_are_one_tensor_and_the_rest_is_as_it_was(source: Path, tmp_path: Path) -> None:
    step = open_step("quantize", {**OWN, "rounding": "nearest"})
    facts = step.run(Artifact(source, {"key": "x", "format": "hf"}), tmp_path, Context())
    assert facts["format"] == "mxfp4"
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert "model.layers.0.self_attn.q_proj" in config["modules_to_not_convert"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    packed = {f"{EXPERTS}{name}" for name in ("gate_up_proj", "down_proj")}
    assert after.keys() == (before.keys() - packed) | {
        f"{each}_{end}" for each in packed for end in ("blocks", "scales")
    }
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - packed)
    opened = open_checkpoint(tmp_path)
    assert check({"path": tmp_path, "name": "x"}, silent)["surplus"] == []
    for name in packed:
        experts = before[name].float()  # [experts, in, out]
        expected = [rounded(each, Mxfp4Scales(), usual(each, Mxfp4Scales())).weight().t() for each in experts]
        assert torch.equal(opened.tensor(name).float(), torch.stack(expected))


def test_transformers_and_the_runtime_read_the_same(source: Path, tmp_path: Path) -> None:
    open_step("quantize", {**OWN, "rounding": "nearest"}).run(
        Artifact(source, {"key": "x", "format": "hf"}), tmp_path, Context()
    )
    ids = np.arange(5, 29)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    opened = open_checkpoint(tmp_path)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            plain.get_parameter(EXPERTS + name).copy_(opened.tensor(EXPERTS + name).float())
        expected = plain(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    found = open_runtime(tmp_path).logits(ids)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_other_models_and_settings_are_refused(source: Path) -> None:
    step = open_step("quantize", OWN)
    assert step.needs_sweep()
    facts = Checkpoint(source).facts
    step.check(facts)
    with pytest.raises(RequestError, match="form gpt-oss is for gpt-oss, and this model is LlamaForCausalLM"):
        step.check(replace(facts, architecture="LlamaForCausalLM"))
