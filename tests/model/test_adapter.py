"""LoRA adapters merged into their base, against what peft computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.model.adapter import WEIGHTS, Merged, base_of
from lighten.model.source import Source, find
from lighten.step import Context
from lighten.store.artifact import Artifact

peft = pytest.importorskip("peft")


@pytest.fixture
def adapter(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that makes an adapter of a tiny model, with weights that are not zero."""

    def make(**settings: Any) -> Path:
        torch.manual_seed(3)
        net = AutoModelForCausalLM.from_pretrained(tiny())
        chosen = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings}
        net = peft.get_peft_model(net, peft.LoraConfig(**chosen))
        for name, weight in net.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(weight, std=0.1)
        net.save_pretrained(tmp_path / "adapter")
        merged = net.merge_and_unload()
        merged.save_pretrained(tmp_path / "expected")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
)
def test_merging_is_what_peft_computes(adapter: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = adapter(**settings)
    found = find(str(folder), merge_adapter=True)
    merged = Merged(folder, found.path)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert expected.keys() == merged.weight_map.keys()
    for name, tensor in expected.items():
        assert torch.allclose(merged.tensor(name), tensor, atol=1e-5), name


def test_the_source_stage_merges(adapter: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter()
    found, base = find(str(folder), merge_adapter=True), find(str(tiny()))
    assert found.identity != base.identity
    step = Source(
        model=found.name, path=str(found.path), format="directory", identity=found.identity, adapter=str(found.adapter)
    )
    (out := tmp_path / "out").mkdir()
    step.run(Artifact(out, {}), out, Context())
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = load_file(tmp_path / "expected" / "model.safetensors")[name]
    assert torch.allclose(load_file(out / "model.safetensors")[name].float(), expected, rtol=0.01, atol=1e-3)


def test_what_is_not_merged_is_refused(adapter: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    folder = adapter()
    with pytest.raises(RequestError, match="no model but a LORA adapter of"):
        find(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(RequestError, match="sets use_dora, which is not merged here"):
        find(str(folder), merge_adapter=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "base_model.model.other.lora_A.weight": torch.ones(4, 4)}, folder / WEIGHTS)
    with pytest.raises(RequestError, match=r"no place for base_model\.model\.other"):
        Merged(folder, tiny())


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The adapter with its tensors changed in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_one_half_of_a_change_is_damage(adapter: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    folder = rewritten(adapter(), lambda tensors: tensors.pop(gone))
    with pytest.raises(Failure, match=r"only one half of model\.layers\.0\.self_attn\.q_proj"):
        Merged(folder, tiny())


def test_a_change_of_another_shape_is_refused(adapter: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    part = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = rewritten(adapter(), lambda tensors: tensors.update({part: tensors[part][:, :-1].contiguous()}))
    with pytest.raises(RequestError, match=r"change of model\.layers\.0\.self_attn\.q_proj\.weight is \[256, 255\]"):
        Merged(folder, tiny()).tensor("model.layers.0.self_attn.q_proj.weight")


def test_a_head_of_another_vocabulary_is_refused(adapter: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        (head,) = (name for name in tensors if "lm_head" in name)
        tensors[head] = tensors[head][:-1].contiguous()

    folder = rewritten(adapter(modules_to_save=["lm_head"]), cut)
    with pytest.raises(RequestError, match="its vocabulary was changed, so merge it with peft"):
        Merged(folder, tiny())


def test_a_quantized_base_is_refused(adapter: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny(), tmp_path / "quantized"))
    config = json.loads((base / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(RequestError, match="is quantized: name its original as the base"):
        Merged(adapter(), base)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, RequestError, "pickled adapters are refused, save it again"),
        (b"\x80\x04.", Failure, "cut short or damaged; fetch it again"),
    ],
)
def test_weights_that_cannot_be_read(
    adapter: Callable[..., Path], tiny: Callable[..., Path], content: bytes | None, error: type, words: str
) -> None:
    folder = adapter()
    (folder / WEIGHTS).unlink()
    if content is not None:
        (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(error, match=words):
        Merged(folder, tiny())


def test_the_base_is_found_beside_its_adapter(adapter: Callable[..., Path], tiny: Callable[..., Path]) -> None:
    folder = adapter()
    settings = json.loads((folder / "adapter_config.json").read_text())
    shutil.copytree(tiny(), folder / "beside")
    for name, expected in (("beside", str(folder / "beside")), ("me/mine", "me/mine")):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": name}))
        assert base_of(folder) == expected
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(RequestError, match="does not name its base: add base_model_name_or_path"):
        base_of(folder)


def test_a_model_beside_its_old_adapter_is_a_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny(), tmp_path / "both"))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/mine"}))
    assert find(str(folder), merge_adapter=True).path == folder
