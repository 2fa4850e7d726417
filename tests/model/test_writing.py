"""Writing side by side is what the model would write one token after the other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.model import attention, writing
from tests.families.models import make


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_every_token_was_sampled_from_the_models_own_distribution(
    tiny: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a forward pass over the whole text for every token, with the same random numbers."""
    monkeypatch.setattr(writing, "MOST", 3)  # so that five sequences take two turns
    model = AutoModelForCausalLM.from_pretrained(
        tiny(family), dtype=torch.float32, attn_implementation=attention.NAME
    ).eval()
    prompts = torch.arange(5 * 4).view(5, 4) * 7 % 900
    counted: list[int] = []
    found = writing.write(model, prompts, 80, torch.Generator().manual_seed(1), counted.append)
    assert found.shape == (5, 80) and torch.equal(found[:, :4], prompts)
    assert counted == sorted(counted) and counted[-1] == 5 * 80
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for part in (found[:3], found[3:]):
            for position in range(4, 80):
                said = torch.softmax(model(part[:, :position]).logits[:, -1].float(), -1)
                assert torch.equal(torch.multinomial(said, 1, generator=generator)[:, 0], part[:, position])


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "mamba2", "lfm2"])
def test_every_family_writes_from_its_own_distribution(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, experts, states without keys, convolutions. Ends of texts and its own settings change nothing."""
    monkeypatch.setattr(writing, "MOST", 3)
    model = AutoModelForCausalLM.from_pretrained(make(family, tmp_path), dtype=torch.float32).eval()
    own = model.generation_config
    own.top_k, own.temperature, own.eos_token_id = 1, 0.1, list(range(0, 250, 2))
    prompts = torch.arange(5 * 4).view(5, 4) * 7 % 250
    counted: list[int] = []
    found = writing.write(model, prompts, 24, torch.Generator().manual_seed(1), counted.append)
    assert found.shape == (5, 24) and torch.equal(found[:, :4], prompts)
    assert counted == sorted(counted) and counted[-1] == 5 * 24
    assert model.generation_config is own
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode(), torch.random.fork_rng():
        for part in (found[:3], found[3:]):
            torch.manual_seed(int(torch.randint(0, 2**31 - 1, (1,), generator=generator)))
            for position in range(4, 24):
                said = torch.softmax(model(part[:, :position], use_cache=False).logits[:, -1].float(), -1)
                assert torch.equal(torch.multinomial(said, 1)[:, 0], part[:, position])


def test_one_query_gets_what_torch_gives_it() -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 8, 1, 16).bfloat16()
    key, value = (torch.randn(3, 2, 40, 16).bfloat16() for _ in range(2))
    found = attention.attend_one(query, key, value, 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), scale=0.25, enable_gqa=True
    )
    assert torch.allclose(found.float(), expected.transpose(1, 2), atol=2e-2)


def test_sequences_side_by_side_fit_the_memory_set_aside(tiny: Callable[..., Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny("llama")).config
    assert writing.side_by_side(config, 100) == writing.MOST
    long = 10**7
    assert writing.side_by_side(config, long) == 1
