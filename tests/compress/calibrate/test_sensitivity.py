"""Sensitivities, one layer in memory at a time, against autograd through the whole model."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lighten.compress.calibrate.sensitivity import Sensitivities, _of_heads
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.prune.choice import mean_loss
from lighten.errors import Failure, RequestError
from lighten.model import stream
from lighten.model.blockwise import BlockwiseModel
from lighten.model.checkpoint import Checkpoint
from lighten.model.sensitivity import FILE, HEAD, Sensitivity
from lighten.model.tokens import calibration_ids
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

Tiny = Callable[..., Path]
SETTINGS = {"samples": 6, "length": 160, "sequences": 3}  # longer than the rows of logits taken at a time


def test_nothing_of_a_graph_is_left_after_the_way_back() -> None:
    linear = torch.nn.Linear(6, 4)
    importance = [0.0] * 3
    linear.register_forward_hook(_of_heads(importance, 5))
    entered = torch.randn(5, 6, requires_grad=True)
    states = entered * 2
    linear(states).sum().backward()
    found = states.detach() * linear.weight.detach().sum(0)
    assert importance == pytest.approx((found.unflatten(-1, (3, 2)).sum(-1).abs().sum(0) / 5).tolist())
    known = weakref.ref(states), weakref.ref(entered)
    del states, entered
    gc.collect()
    assert [each() for each in known] == [None, None]


@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama-tied", "qwen2", "mistral"])
def test_are_those_of_the_whole_model(family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    source = tiny(family)
    reports: list[tuple[int, int]] = []
    context = Context(report=lambda done, total, note: reports.append((done, total)))
    facts = Sensitivities(**SETTINGS).run(Artifact(source, {"key": "x", "format": "hf"}), tmp_path, context)
    found = Sensitivity.read(tmp_path)
    assert (facts["sequences"], facts["tokens"], found.tokens) == (3, 480, 480)
    assert reports == [(done, 4) for done in range(1, 5)]

    ids = torch.from_numpy(calibration_ids(source, "builtin", 6, 160))[::2]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.requires_grad_(False)
    outputs: dict[str, torch.Tensor] = {}
    head_inputs = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if name == "model.embed_tokens":
                output.requires_grad_()
            output.retain_grad()
            outputs[name] = output
            if name == "lm_head":
                head_inputs.append(inputs[0].detach())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.register_forward_hook(keep(name))
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert set(found.outputs) == set(outputs)
    assert len(outputs) == 16
    for name, output in outputs.items():
        assert found.outputs[name] == pytest.approx(float(output.grad.double().square().mean()), rel=1e-3), name
    rows = head_inputs[0].flatten(0, 1).double()
    assert torch.allclose(found.head_gram.double(), rows.t() @ rows, rtol=1e-4, atol=1e-2)
    assert torch.equal(found.counts.long(), torch.bincount(ids.flatten(), minlength=model.config.vocab_size))
    assert int(found.counts.sum()) == found.tokens


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = Sensitivity({"lm_head": 0.5, "a.b": 1e-12}, torch.rand(4, 4).t(), torch.arange(9, dtype=torch.int32), 36)
    written.write(tmp_path)
    found = Sensitivity.read(tmp_path)
    assert (found.outputs, found.tokens) == (written.outputs, written.tokens)
    assert torch.equal(found.head_gram, written.head_gram)
    assert torch.equal(found.counts, written.counts)


@pytest.mark.parametrize("file", [FILE, HEAD])
@pytest.mark.parametrize("damage", ["gone", "cut short", "other"])
def test_damage_is_one_clear_failure(tmp_path: Path, file: str, damage: str) -> None:
    Sensitivity({"a": 1.0}, torch.eye(2), torch.ones(3, dtype=torch.int32), 3).write(tmp_path)
    path = tmp_path / file
    if damage == "gone":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.write_text("{}")
    with pytest.raises(Failure, match="does not hold the sensitivities of a model") as raised:
        Sensitivity.read(tmp_path)
    assert str(tmp_path) in str(raised.value)


FAMILIES = ("gemma3n_text", "granitemoehybrid", "deepseek_v3", "llama4_text", "zamba2")


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft caps, states that pass by the layers, layers that share weights, latent attention, two kinds of layers."""
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    (folder := tmp_path / "model").mkdir()
    (out := tmp_path / "out").mkdir()
    source = make(family, folder)
    Sensitivities(samples=2, length=40, sequences=2).run(Artifact(source, {"key": "x"}), out, Context())
    found = Sensitivity.read(out)
    anatomy = BlockwiseModel(source).anatomy
    names = {
        f"{layer.module}.{each.module}": layer.prefix + each.name
        for layer in anatomy.layers
        for each in layer.linears
        if each.inside is None
    }
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    squares: dict[str, float] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def add(gradient: torch.Tensor) -> None:
            mean = float(gradient.double().square().sum()) / (80 * gradient.shape[-1])
            squares[name] = squares.get(name, 0.0) + mean

        def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        module.register_forward_hook(hook)

    for module, stored in {**names, "lm_head": "lm_head"}.items():
        watch(stored, model.get_submodule(module))
    watch("model.embed_tokens", model.get_input_embeddings())
    ids = torch.from_numpy(calibration_ids(source, "builtin", 2, 40))
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    assert {
        name for name in found.outputs if ".experts." not in name
    } == squares.keys()  # those: test_expert_outputs.py
    for name, square in squares.items():
        assert found.outputs[name] == pytest.approx(square, rel=1e-3), name
    ours = mean_loss(Checkpoint(source), ids, Context())
    assert ours == pytest.approx(float(loss.detach()) / 78, rel=1e-5)


def test_a_budget_on_another_family(tmp_path: Path) -> None:
    """Gemma 3: soft caps, norms of 1 + w, four norms in a layer."""
    for name in ("model", "grams", "sensitivity", "out"):
        (tmp_path / name).mkdir()
    source = Artifact(make("gemma3_text", tmp_path / "model"), {"key": "x", "format": "hf"})
    context = Context(grams=tmp_path / "grams", sensitivity=tmp_path / "sensitivity")
    Sweep(samples=4, length=40).run(source, tmp_path / "grams", Context())
    Sensitivities(samples=4, length=40, sequences=2).run(source, tmp_path / "sensitivity", Context())
    step = open_step("quantize", {"method": "gptq", "group_size": 32, "budget": {"bits": 5}})
    facts = step.run(source, tmp_path / "out", context)
    assert facts["bits_per_linear_weight"] <= 5 and facts["quantized_linears"] > 20
    assert step.any_family


class _NoWayBack(torch.autograd.Function):
    """A kernel that has a forward only."""

    @staticmethod
    def forward(context: Any, states: torch.Tensor) -> torch.Tensor:
        return states * 2


def test_what_has_no_gradients_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, states: self.down_proj(_NoWayBack.apply(self.up_proj(states)))
    )
    (folder := tmp_path / "model").mkdir()
    with pytest.raises(RequestError, match=r"LlamaForCausalLM has no gradients in model.layers.3 .*leave out what"):
        Sensitivities(samples=1, length=8).run(Artifact(make("llama", folder), {"key": "x"}), tmp_path, Context())
