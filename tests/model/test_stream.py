"""The sweep gathers the inputs of linears, and shards hold what was written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sweep import Sweep
from lighten.errors import RequestError
from lighten.model import attention
from lighten.model.architectures import check_architecture
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import read_layer
from lighten.model.shards import ShardWriter
from lighten.step import Context
from lighten.store.artifact import Artifact


def test_the_sweep_gathers_the_inputs_of_every_linear(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny("llama", dtype=torch.float32)
    source = Artifact(path, {"key": "x"})
    context = Context()
    facts = Sweep(data="builtin", samples=4, length=32).run(source, tmp_path, context)
    dtype = getattr(torch, facts["arithmetic"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
            )
    from lighten.model.tokens import calibration_ids

    with torch.inference_mode():
        model(torch.from_numpy(calibration_ids(path, "builtin", 4, 32)))
    assert (facts["samples"], facts["tokens"]) == (4, 128)
    for layer in range(2):
        grams, read_by = read_layer(tmp_path, layer)
        assert len(read_by) == 7
        assert len(grams) == 4
        for linear, name in read_by.items():
            inputs = torch.cat(seen[f"{layer}.{linear}"]).double()
            exact = inputs.t() @ inputs
            assert (grams[name].matrix() - exact).norm() < 1e-2 * exact.norm()
            assert grams[name].tokens == 128


def test_shards_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.weight": torch.randn(7, n + 1).to(torch.bfloat16) for n in range(5)}
    tensors["codes"] = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    with ShardWriter(tmp_path, len(tensors), shard_bytes=60) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    (tmp_path / "config.json").write_text("{}")
    assert set(Checkpoint(tmp_path).weight_map) == set(tensors)
    assert torch.equal(Checkpoint(tmp_path).tensor("codes"), tensors["codes"])


def test_a_shard_that_failed_gets_no_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 1) as writer:
        writer.add("a", torch.zeros(3))
        raise RuntimeError
    assert list(tmp_path.glob("*.safetensors")) == []


def test_unsupported_architectures_are_refused() -> None:
    with pytest.raises(RequestError, match=r"knows the layers of LlamaForCausalLM.* not those of BertModel"):
        check_architecture("BertModel")
