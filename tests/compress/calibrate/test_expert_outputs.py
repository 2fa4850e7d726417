"""The derivatives by what each expert gives, against experts that run one by one in the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.model import stream
from lighten.model.blockwise import BlockwiseModel
from lighten.model.sensitivity import Sensitivity
from lighten.model.tokens import calibration_ids
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)


def sensitivities(family: str, folder: Path) -> tuple[Path, Sensitivity]:
    for name in ("model", "sensitivity"):
        (folder / name).mkdir()
    source = make(family, folder / "model")
    Sensitivities(samples=2, length=40, sequences=2).run(
        Artifact(source, {"key": "x"}), folder / "sensitivity", Context()
    )
    return source, Sensitivity.read(folder / "sensitivity")


def test_are_those_of_experts_that_run_one_by_one(tmp_path: Path) -> None:
    source, found = sensitivities("qwen3_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    seen: dict[str, list[torch.Tensor]] = {}

    def one_by_one(name: str, module: Any) -> Any:
        def keep(expert: int, part: str, value: torch.Tensor) -> torch.Tensor:
            value.retain_grad()
            seen.setdefault(f"{name}.{expert}.{part}", []).append(value)
            return value

        def forward(states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(states)
            for expert in range(module.num_experts):
                tokens, places = (chosen == expert).nonzero(as_tuple=True)
                gate_weight, up_weight = module.gate_up_proj[expert].chunk(2)
                gate = keep(expert, "gate_proj", states[tokens] @ gate_weight.t())
                up = keep(expert, "up_proj", states[tokens] @ up_weight.t())
                down = keep(expert, "down_proj", (nn.functional.silu(gate) * up) @ module.down_proj[expert].t())
                total = total.index_add(0, tokens, down * shares[tokens, places, None])
            return total

        return forward

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.forward = one_by_one(name, module)  # type: ignore[method-assign]
    ids = torch.from_numpy(calibration_ids(source, "builtin", 2, 40))
    logits = model(ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert len(seen) == 4 * 4 * 3
    for name, values in seen.items():
        gradients = torch.cat([value.grad for value in values if value.grad is not None])
        if len(gradients):
            assert found.outputs[name] == pytest.approx(float(gradients.square().mean()), rel=1e-3), name
        assert name in found.outputs


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_every_matrix_has_one(family: str, tmp_path: Path) -> None:
    """Inputs before outputs, gates and ups in turn; one product of all experts."""
    source, found = sensitivities(family, tmp_path)
    anatomy = BlockwiseModel(source).anatomy
    names = {layer.prefix + each.name for layer in anatomy.layers for each in layer.linears}
    assert names <= found.outputs.keys()
    assert all(found.outputs[name] > 0 for name in names)


def test_a_budget_on_a_model_with_experts(tmp_path: Path) -> None:
    source, _ = sensitivities("qwen3_moe", tmp_path)
    for name in ("grams", "out"):
        (tmp_path / name).mkdir()
    artifact = Artifact(source, {"key": "x", "format": "hf"})
    Sweep(samples=3, length=32).run(artifact, tmp_path / "grams", Context())
    step = open_step("quantize", {"method": "gptq", "group_size": 32, "budget": {"bits": 5}})
    context = Context(grams=tmp_path / "grams", sensitivity=tmp_path / "sensitivity")
    facts = step.run(artifact, tmp_path / "out", context)
    assert facts["bits_per_linear_weight"] <= 5
    assert any(".experts." in name for name in facts["allocation"])
