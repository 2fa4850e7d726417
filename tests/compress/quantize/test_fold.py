"""Scaling the inputs of linears leaves the model as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.compress.quantize import awq, fold, smooth
from lighten.compress.quantize.methods.gptq import Gptq
from lighten.model.anatomy import LAYERS
from lighten.model.blockwise import known_anatomy, known_folds
from lighten.model.checkpoint import Checkpoint
from lighten.model.folds import Fold
from lighten.observe.gram import LayerInputs

GROUPS = {
    "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}
Tiny = Callable[..., Path]


def random_scale(tensors: fold.Tensors, first: str, _inputs: LayerInputs, repeats: int, head_dim: int) -> torch.Tensor:
    width = tensors[f"{first}.weight"].shape[1]
    raw = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(width)))
    return fold.shared(raw, repeats, head_dim)


def awq_scale(tensors: fold.Tensors, first: str, inputs: LayerInputs, repeats: int, head_dim: int) -> torch.Tensor:
    weight = torch.cat([tensors[f"{linear}.weight"] for linear in GROUPS[first]])
    settings = {"bits": 4, "group_size": 32, "sym": False, "repeats": repeats, "head_dim": head_dim}
    return awq.search_scale(weight, inputs.grams[first].matrix(), **settings)


def smooth_scale(tensors: fold.Tensors, first: str, inputs: LayerInputs, repeats: int, head_dim: int) -> torch.Tensor:
    weight = torch.cat([tensors[f"{linear}.weight"] for linear in GROUPS[first]])
    return smooth.smooth(weight, inputs.grams[first].absmax, 0.5, repeats, head_dim)


def even_scale(tensors: fold.Tensors, first: str, inputs: LayerInputs, repeats: int, head_dim: int) -> torch.Tensor:
    gram = inputs.grams[first]
    found = smooth.even(Gptq(method="gptq", smooth=0.8), torch.empty(0), gram, repeats, head_dim)
    loud = gram.matrix().diagonal().sqrt()
    if repeats == 1:  # as the formula has it: the ratio of two channels is that of their sizes, to the power
        assert torch.allclose(found / found[0], (loud / loud[0]) ** 0.8, rtol=1e-3)
    assert abs(float(found.log().mean())) < 1e-4
    return found


@pytest.mark.parametrize("choose", [random_scale, awq_scale, smooth_scale, even_scale])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama-bias", {}),  # biases everywhere, head_dim · heads is not the hidden size
        ("qwen2", {"num_attention_heads": 8}),  # four queries to a key
        ("qwen2", {"num_key_value_heads": 4}),  # no grouped queries
        ("mistral", {"intermediate_size": 320}),
    ],
)
@torch.no_grad()
def test_the_model_computes_what_it_did(tiny: Tiny, family: str, sizes: dict[str, int], choose: Callable) -> None:
    path = tiny(family, **sizes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(64)[None] * 13 % 900
    gathered = []
    for layer in model.model.layers:
        inputs = LayerInputs("cpu")
        gathered.append(inputs)
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(inputs.hook(name))
    before = model(ids).logits
    state = model.state_dict()
    head_dim = model.model.layers[0].self_attn.head_dim
    checkpoint = Checkpoint(path)
    ((_, places),) = known_folds(checkpoint, known_anatomy(checkpoint, None)).items()
    assert {place.linears[0]: sorted(place.linears) for place in places} == {k: sorted(v) for k, v in GROUPS.items()}
    moved = 0.0
    for number, inputs in enumerate(gathered):
        prefix = f"{LAYERS}{number}."
        tensors = {name.removeprefix(prefix): each.clone() for name, each in state.items() if name.startswith(prefix)}
        old = dict(tensors)
        assert set(inputs.grams) == set(GROUPS)
        for place in places:
            first, repeats = place.linears[0], place.repeats
            heads = model.config.num_attention_heads // model.config.num_key_value_heads
            assert repeats == (heads if first == "self_attn.o_proj" else 1)
            scale = fold.exact(choose(old, first, inputs, repeats, head_dim), tensors, place)
            assert (scale > 0).all()
            fold.fold(tensors, place, scale, head_dim)
            moved = max(moved, float((scale.log()).abs().max()))
        state |= {prefix + name: tensor for name, tensor in tensors.items()}
    assert moved > 0.3
    for layer in model.model.layers:
        for module in layer.modules():
            module._forward_pre_hooks.clear()
    model.load_state_dict(state)
    after = model(ids).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_an_exact_scale_leaves_the_norm_nothing_to_round(kind: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = (1 + 0.3 * torch.randn(256, generator=generator)).to(kind)
    norm = (norm.float() - offset).to(kind)
    norm[7] = -offset
    place = Fold(("self_attn.q_proj",), "input_layernorm", offset)
    tensors = {
        "input_layernorm.weight": norm,
        "self_attn.q_proj.weight": torch.randn(8, 256, generator=generator).to(kind),
    }
    wanted = torch.exp(torch.randn(256, generator=generator))
    scale = fold.exact(wanted, tensors, place)
    assert scale[7] == 1
    kept = norm != -offset
    assert ((scale / wanted - 1).abs()[kept] <= (1 if offset == 0 else 40) * torch.finfo(kind).eps).all()
    fold.fold(tensors, place, scale, 8)
    made = tensors["input_layernorm.weight"]
    assert made.dtype == kind
    whole = norm.float() + offset
    assert torch.allclose((made.float() + offset) * scale, whole, rtol=3e-7, atol=1e-6 * offset)  # float32's rounding
