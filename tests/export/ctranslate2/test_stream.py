"""Models compute the same after their states were turned and their inputs evened, and loud inputs are gone."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lighten.export.ctranslate2.rounding import round_linears
from lighten.export.ctranslate2.step import ready
from lighten.export.ctranslate2.stream import changed, rotation, watched
from lighten.step import Context, silent

WIDTH = 48
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": WIDTH},
    "gpt_neox": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "n_inner": 80},
}
TURN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt_neox", "opt", "gpt2")
"""Families whose states can be turned."""
STAY = ("gemma2", "gemma3_text", "bloom")
"""Families whose states cannot: a norm writes to them."""


def model_of(family: str) -> tuple[Any, torch.Tensor]:
    """Returns a random model with one loud channel in its states, and tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **OTHERS.get(family, {})})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif ("embed" in name or "wte" in name) and parameter.shape[1] == WIDTH:
                parameter[:, 5] += 20
    return model, torch.randint(3, 96, (2, 40))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", TURN)
def test_turned_models_compute_the_same_without_loud_inputs(family: str) -> None:
    model, ids = model_of(family)
    before, crest = logits(model, ids), crests(model, ids)
    assert changed(model, ids, turned=True)
    after = logits(model, ids)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert crests(model, ids) < 0.7 * crest
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    told = round_linears(model, ids, silent)
    assert told["linears_rounded_to_nearest"] == 0
    assert told["linears_rounded_with_feedback"] > 8
    assert (logits(model, ids) - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.parametrize("family", STAY)
def test_states_that_a_norm_writes_to_are_not_turned_but_evened(family: str) -> None:
    model, ids = model_of(family)
    assert not changed(model, ids, turned=True)
    model, ids = model_of(family)
    before = logits(model, ids)
    assert changed(model, ids, turned=False)
    assert (logits(model, ids) - before).abs().max() < 1e-4 * before.abs().max()
    rounded, told = ready(lambda: model_of(family)[0], ids, Context())
    assert told["inputs"] == "evened"
    assert (logits(rounded, ids) - before).abs().max() < 0.1 * before.abs().max()


def test_a_norm_with_another_reader_is_not_changed() -> None:
    def load() -> Any:
        model, _ = model_of("llama")
        layer = model.model.layers[0]
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: layer.register_buffer("kept", out))
        layer.register_forward_hook(lambda _, __, out: out + layer.kept)
        return model

    _, ids = model_of("llama")
    assert not changed(load(), ids, turned=True)
    assert not changed(load(), ids, turned=False)
    assert ready(load, ids, Context())[1]["inputs"] == "as they are"


def test_readers_and_writers_are_seen_in_a_run() -> None:
    model, ids = model_of("gemma")
    stream = watched(model, ids[:1])
    names = {module: name for name, module in model.named_modules()}
    assert [names[norm.module] for norm in stream.norms][-1] == "model.norm"
    assert {norm.offset for norm in stream.norms} == {1.0}
    assert {names[each].rpartition(".")[2] for each in stream.writers} == {"o_proj", "down_proj"}
    assert [names[each] for each in stream.norms[-1].readers] == ["lm_head"]


@given(st.integers(2, 40))
def test_a_rotation_keeps_lengths_and_means(width: int) -> None:
    matrix = rotation(width)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(0), torch.ones(width, dtype=torch.float64))


@torch.no_grad()
def crests(model: Any, ids: torch.Tensor) -> float:
    """Returns the mean ratio of the largest input of the head to the root mean square of its token's inputs."""
    seen: list[torch.Tensor] = []
    head: nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    logits(model, ids)
    hook.remove()
    return float((seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean())
