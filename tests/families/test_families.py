"""Models of many families go through the sweep and through methods, and open again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.quantize.quantized_layers import Layers
from lighten.errors import RequestError
from lighten.evaluate.runtimes.torch import TorchRuntime
from lighten.model import blockwise, stream, whole
from lighten.model.checkpoint import Checkpoint
from lighten.model.empty import Filler
from lighten.model.grams import read_index, read_layer
from lighten.model.tokens import calibration_ids
from lighten.model.unpacked import open_checkpoint
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.__main__ import judged
from tests.families.models import make
from tests.families.trial import loaded, trial

FAMILIES = (
    *("qwen3", "qwen3_5_text", "gemma3_text", "gemma3n_text", "gemma4_text", "phi3", "olmo2", "lfm2", "cohere2", "opt"),
    *("gpt_neox", "falcon", "apertus", "mamba2", "falcon_h1", "gpt2", "bloom"),
    *("qwen3_moe", "mixtral", "gpt_oss", "granitemoehybrid", "deepseek_v3", "llama4_text", "nemotron_h", "jamba"),
    *("qwen3_vl", "llama4", "llava"),
)
"""Families that differ in kind: dense, hybrids, experts, and models that also see. `make families` tries all."""
SCALED_FAMILIES = (
    *("qwen3", "gemma3_text", "gemma3n_text", "phi3", "olmo2", "opt", "apertus", "lfm2", "gpt2"),
    *("qwen3_moe", "qwen3_5_moe_text", "mixtral", "gpt_oss", "nemotron_h", "llama4_text"),
)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32, so that the sweep's numbers are those of the plain forward."""
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    yield


def artifact(family: str, tmp_path: Path) -> Artifact:
    (folder := tmp_path / "model").mkdir()
    return Artifact(make(family, folder), {"key": "x", "format": "hf"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_swept_quantized_and_opened(family: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make(family, tmp_path / "model")
    row = trial(tmp_path)
    assert judged(row) == "ok"
    assert row["promised"] > 0.3
    assert all(found["error"] < 0.05 for found in row["methods"].values())


@pytest.mark.parametrize("family", ["qwen3", "phi3", "falcon_h1", "gpt2"])
def test_grams_are_of_the_inputs_of_the_plain_forward(family: str, tmp_path: Path) -> None:
    source = artifact(family, tmp_path)
    (grams := tmp_path / "grams").mkdir()
    Sweep(samples=3, length=32).run(source, grams, Context())
    plain = loaded(source.path)
    anatomy = blockwise.known_anatomy(Checkpoint(source.path), grams)
    modules = {
        layer.prefix + each.name: f"{layer.module}.{each.module}" for layer in anatomy.layers for each in layer.linears
    }
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in modules.items():
        plain.get_submodule(module).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        plain(torch.from_numpy(calibration_ids(source.path, "builtin", 3, 32)), use_cache=False)
    assert seen.keys() == modules.keys()
    for number, layer in enumerate(read_index(grams)["layers"]):
        found, read_by = read_layer(grams, number)
        for linear, name in read_by.items():
            inputs = torch.cat(seen[layer["prefix"] + linear])
            exact = inputs.t() @ inputs
            assert (found[name].matrix() - exact).norm() < 1e-4 * exact.norm(), layer["prefix"] + linear


def test_no_weight_is_skipped_in_silence(tmp_path: Path) -> None:
    """What a quantized model says of itself is what its files hold."""
    source = artifact("qwen3_moe", tmp_path)
    (out := tmp_path / "out").mkdir()
    facts = open_step("quantize", {"method": "rtn", "bits": 4, "group_size": 32}).run(source, out, Context())
    plain, stored = Checkpoint(source.path), open_checkpoint(out)
    assert stored.shapes().keys() == plain.weight_map.keys()
    changed = {
        name.removesuffix(".weight")
        for name in plain.weight_map
        if not torch.equal(stored.tensor(name).float(), plain.tensor(name).float())
    }
    assert facts["quantized_linears"] == len(changed)
    anatomy = blockwise.known_anatomy(plain, None)
    matrices = {name for name, shape in plain.shapes().items() if len(shape) > 1 and anatomy.placed(name)}
    assert {name.removesuffix(".weight") for name in matrices} - changed <= {each["what"] for each in facts["kept"]}


SCALED = ({"method": "awq", "group_size": 32}, {"method": "w8a8"})


@pytest.mark.parametrize("settings", SCALED, ids=["awq", "w8a8"])
@pytest.mark.parametrize("family", SCALED_FAMILIES)
def test_scaled_inputs_leave_the_model_as_it_was(family: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Nothing is rounded: what is left is the folding of scales, which changes no output."""
    source = artifact(family, tmp_path)
    (grams := tmp_path / "grams").mkdir()
    Sweep(samples=2, length=32).run(source, grams, Context())
    step = open_step("quantize", settings)
    checkpoint = Checkpoint(source.path)
    anatomy = blockwise.known_anatomy(checkpoint, grams)
    folds = blockwise.known_folds(checkpoint, anatomy)
    layers = Layers(step, checkpoint, grams, "cpu", tmp_path, anatomy, folds)
    made = {name: checkpoint.tensor(name) for name in checkpoint.weight_map}
    moved = 0
    for index in range(len(layers)):
        with torch.inference_mode():
            prefix, tensors, inputs = layers.read(index)
            moved += len(layers.scale_inputs(index, prefix, tensors, inputs))
        for name in [name for name in made if name.startswith(prefix)]:
            del made[name]
        as_stored = anatomy.layers[index].as_stored
        made |= {prefix + name: as_stored(name, tensor) for name, tensor in tensors.items()}
    made = {name: tensor.clone() for name, tensor in made.items()}  # outside of inference
    plain, scaled = loaded(source.path), loaded(source.path)
    Filler(scaled, made).fill(made, "cpu")
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        before, after = plain(ids, use_cache=False).logits, scaled(ids, use_cache=False).logits
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
    assert moved or not folds or not any(folds.values())


def test_experts_in_an_unknown_form_are_refused_by_name(tmp_path: Path) -> None:
    source = artifact("jetmoe", tmp_path)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match=r"has experts .*that lighten does not take apart"):
        open_step("quantize", {"method": "rtn", "bits": 4, "group_size": 32}).run(source, out, Context())


@pytest.mark.parametrize("family", ["mamba", "jamba", "qwen3_moe", "falcon_h1", "gemma3n_text", "bart"])
def test_linears_that_are_read_without_a_call_are_left_alone(family: str, tmp_path: Path) -> None:
    """What a forward without storage shows is what a sweep sees."""
    source = artifact(family, tmp_path)
    (grams := tmp_path / "grams").mkdir()
    Sweep(samples=1, length=32).run(source, grams, Context())
    checkpoint = Checkpoint(source.path)
    found, swept = (blockwise.known_anatomy(checkpoint, each) for each in (None, grams))
    assert [layer.linears for layer in found.layers] == [layer.linears for layer in swept.layers]
    assert not blockwise.doubts(found)
    left = {name for layer in found.layers for name, why in layer.kept.items() if "without calling" in why}
    assert bool(left) == (family in ("mamba", "jamba", "bart"))


def test_a_forward_that_stops_is_a_doubt_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = artifact("qwen3", tmp_path)
    (out := tmp_path / "out").mkdir()

    def stops(*_: object, **__: object) -> None:
        raise RuntimeError("no numbers here")

    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3MLP.forward", stops)
    context = Context()
    facts = open_step("quantize", {"method": "rtn", "bits": 4, "group_size": 32}).run(source, out, context)
    assert any("no numbers here" in each for each in context.warnings)
    assert facts["quantized_linears"] == 28  # none is left alone for a forward that did not reach it


def test_formats_that_nobody_opens_with_experts_are_refused(tmp_path: Path) -> None:
    source = artifact("qwen3_moe", tmp_path)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="bitsandbytes opens none that are quantized: use gptq, awq or rtn"):
        open_step("quantize", {"method": "nf4"}).run(source, out, Context())


def test_a_runtime_puts_experts_together_and_says_so(tmp_path: Path) -> None:
    source = artifact("qwen3_moe", tmp_path)
    for method in ({"method": "rtn", "bits": 4, "group_size": 32}, {"method": "fp8"}):
        (out := tmp_path / method["method"]).mkdir()
        open_step("quantize", method).run(source, out, Context())
        runtime = TorchRuntime(out, "cpu", None)
        assert "transformers opens no quantized experts" in runtime.detail
        assert ("are not rounded here" in runtime.detail) == (method["method"] == "fp8")
        ids = np.arange(5, 37)
        with torch.no_grad():
            wanted = whole.load(out, torch.float32)(torch.from_numpy(ids)[None], use_cache=False).logits[0]
        assert np.abs(runtime.logits(ids) - wanted.numpy()).max() < 1e-3


def test_a_tower_is_carried_over_and_still_sees(tmp_path: Path) -> None:
    source = artifact("llava", tmp_path)
    (out := tmp_path / "out").mkdir()
    facts = open_step("quantize", {"method": "rtn", "bits": 4, "group_size": 32}).run(source, out, Context())
    assert {"model.vision_tower", "model.multi_modal_projector"} <= {each["what"] for each in facts["kept"]}
    before, after = Checkpoint(source.path), open_checkpoint(out)
    tower = [name for name in before.weight_map if "vision" in name or "projector" in name]
    assert tower
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in tower)
    model = whole.load(out, torch.float32)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    picture = torch.randn(1, 3, 28, 28)
    token = (
        model.config.image_token_index if hasattr(model.config, "image_token_index") else model.config.image_token_id
    )
    ids = torch.tensor([[5, *([token] * 4), 6, 7]])
    with torch.no_grad():
        seen = model(input_ids=ids, pixel_values=picture).logits
        other = model(input_ids=ids, pixel_values=-picture).logits
    assert torch.isfinite(seen).all()
    assert not torch.allclose(seen, other)
