"""Models of many families go through the sweep and through methods, and open again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.quantize.quantized_layers import Layers
from lighten.errors import RequestError
from lighten.model import blockwise, stream
from lighten.model.checkpoint import Checkpoint
from lighten.model.empty import Filler
from lighten.model.grams import read_index, read_layer
from lighten.model.tokens import calibration_ids
from lighten.model.unpacked import open_checkpoint
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

FAMILIES = (
    *("qwen3", "qwen3_5_text", "gemma3_text", "gemma3n_text", "phi3", "olmo2", "lfm2", "cohere2", "gpt_neox", "falcon"),
    *("opt", "apertus", "mamba2", "falcon_h1"),
)
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


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_swept_quantized_and_opened(family: str, tmp_path: Path) -> None:
    source = artifact(family, tmp_path)
    (grams := tmp_path / "grams").mkdir()
    Sweep(samples=3, length=32).run(source, grams, Context())
    plain = loaded(source.path)
    index = read_index(grams)
    anatomy = blockwise.known_anatomy(Checkpoint(source.path), grams)

    # the inputs of every linear are those of the plain forward
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
    for number, layer in enumerate(index["layers"]):
        found, read_by = read_layer(grams, number)
        for linear, name in read_by.items():
            inputs = torch.cat(seen[layer["prefix"] + linear])
            exact = inputs.t() @ inputs
            assert (found[name].matrix() - exact).norm() < 1e-4 * exact.norm(), layer["prefix"] + linear

    for method in ({"method": "gptq", "group_size": 32}, {"method": "rtn", "group_size": 32}):
        (out := tmp_path / method["method"]).mkdir()
        facts = open_step("quantize", {"bits": 4, **method}).run(source, out, Context(grams=grams))
        whole, stored = Checkpoint(source.path), open_checkpoint(out)
        assert stored.shapes().keys() == whole.weight_map.keys()
        assert facts["quantized_linears"] == sum(
            not torch.equal(stored.tensor(name).float(), whole.tensor(name).float()) for name in whole.weight_map
        )
        named = {each["what"] for each in facts["kept"]}
        changed = {f"{name}.weight" for name in modules}
        matrices = {name for name, shape in whole.shapes().items() if len(shape) > 1 and anatomy.placed(name)}
        assert {name.removesuffix(".weight") for name in matrices - changed} <= named  # none is skipped in silence
        assert facts["output_error"]["mean"] < 0.05 if method["method"] == "gptq" else True


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


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_refused_by_name(family: str, tmp_path: Path) -> None:
    source = artifact(family, tmp_path)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match=r"has experts .*which no method takes yet"):
        open_step("quantize", {"method": "rtn", "bits": 4, "group_size": 32}).run(source, out, Context())
