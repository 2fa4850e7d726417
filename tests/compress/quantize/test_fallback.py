"""Grams that GPTQ can do nothing with: that layer is rounded to nearest, and the person is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.quantize.grid import rtn
from lighten.errors import RequestError
from lighten.model.quantized.gptq import Gptq
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def swept(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    source = Artifact(tiny("llama", dtype=torch.bfloat16), {"key": "x", "format": "hf"})
    grams = tmp_path_factory.mktemp("grams")
    Sweep(samples=8, length=64).run(source, grams, Context())
    return source, grams


@pytest.fixture(params=["not a number", "negative"])
def broken(request: pytest.FixtureRequest, swept: tuple[Artifact, Path], tmp_path: Path) -> Path:
    """The Grams, that of one linear spoilt."""
    folder = shutil.copytree(swept[1], tmp_path / "grams")
    file = folder / "layer-00001.safetensors"
    tensors = load_file(file)
    gram = tensors["mlp.down_proj.gram"]
    tensors["mlp.down_proj.gram"] = torch.full_like(gram, torch.nan) if request.param == "not a number" else -gram
    save_file(tensors, file)
    return Path(folder)


@pytest.mark.parametrize("desc_act", [True, False])
def test_gptq_rounds_that_layer_to_nearest(
    swept: tuple[Artifact, Path], broken: Path, tmp_path: Path, desc_act: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    context = Context(grams=broken)
    facts = open_step("quantize", {"group_size": 32, "desc_act": desc_act}).run(swept[0], out, context)
    assert facts["rounded_to_nearest"] == [DOWN]
    assert len(context.warnings) == 1
    assert context.warnings[0].startswith(f"{DOWN}: rounded to nearest, for its Gram is not positive definite")
    json.dumps(facts, allow_nan=False)  # as the manifest is written
    tensors = load_file(out / "model.safetensors")
    parts = {name: tensors[f"{DOWN}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    weight = load_file(swept[0].path / "model.safetensors")[f"{DOWN}.weight"]
    assert torch.equal(Gptq({"bits": 4}).weight(parts), rtn(weight, 4, 32, True).weight())
    # every other layer is as it would have been
    (tmp_path / "sound").mkdir()
    sound = open_step("quantize", {"group_size": 32, "desc_act": desc_act}).run(
        swept[0], tmp_path / "sound", Context(grams=swept[1])
    )
    assert "rounded_to_nearest" not in sound
    for name, tensor in load_file(tmp_path / "sound" / "model.safetensors").items():
        assert name.startswith(DOWN) or torch.equal(tensor, tensors[name])


def test_awq_leaves_that_layer_as_it_is(swept: tuple[Artifact, Path], broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    facts = open_step("quantize", {"method": "awq", "group_size": 32}).run(swept[0], out, Context(grams=broken))
    json.dumps(facts, allow_nan=False)
    assert all(torch.isfinite(each).all() for each in load_file(out / "model.safetensors").values())


def test_a_budget_asks_for_more_text(swept: tuple[Artifact, Path], broken: Path, tmp_path: Path) -> None:
    sensitivity, out = tmp_path / "sensitivity", tmp_path / "out"
    sensitivity.mkdir()
    out.mkdir()
    Sensitivities(samples=2, length=32, sequences=1).run(swept[0], sensitivity, Context())
    step = open_step("quantize", {"budget": "bits=4.5", "group_size": 32})
    with pytest.raises(RequestError, match=rf"the Gram of {DOWN}, which is not positive definite.*give it more text"):
        step.run(swept[0], out, Context(grams=broken, sensitivity=sensitivity))
