"""The memory of training, against published totals and by counting weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.facts import ModelFacts
from lighten.model.checkpoint import facts_of, read_config
from lighten.recommend import published, training
from lighten.recommend.sizes import Sizes

LLAMA_65B = ModelFacts("LlamaForCausalLM", 80, 8192, 22016, 64, 64, 128, 32000, tied=False)
LLAMA_3_8B = ModelFacts("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128, 128256, tied=False)


def test_65b_fits_48_gb_with_qlora_and_nothing_else_does() -> None:
    """The claim of QLoRA's abstract, and the terabyte that ZeRO's 16 bytes come to."""
    found = {way.name: way for way in training.ways(LLAMA_65B)}
    assert LLAMA_65B.params == pytest.approx(65.3e9, rel=0.01)
    assert found["full"].weights == 16 * LLAMA_65B.params
    assert found["qlora"].total < 48e9 < found["lora"].total < found["full"].total


def test_adapters_are_counted_as_they_would_be_made(tiny) -> None:  # type: ignore[no-untyped-def]
    folder: Path = tiny(dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    brute = sum(16 * (each.in_features + each.out_features) for each in linears)
    found = {way.name: way for way in training.ways(facts_of(read_config(folder), "tiny"))}
    assert found["lora"].trained == brute
    assert found["full"].trained == sum(parameter.numel() for parameter in model.parameters())


def test_more_tokens_take_more_activations_only() -> None:
    short, long = training.ways(LLAMA_3_8B, 512)[1], training.ways(LLAMA_3_8B, 1024)[1]
    assert long.activations == 2 * short.activations
    assert long.weights == short.weights


def test_sizes_of_published_types_are_those_that_were_published_with_them() -> None:
    """llama.cpp's board gives files of Llama-3-8B in GiB: 7.96, 6.14, 5.33, 4.58, 3.74."""
    found = {each.name: each for each in published.formats(Sizes(LLAMA_3_8B), 2048)}
    for name, gib in {"q8_0": 7.96, "q6_k": 6.14, "q5_k_m": 5.33, "q4_k_m": 4.58, "q3_k_m": 3.74}.items():
        assert found[name].size_bytes / 2**30 == pytest.approx(gib, rel=0.02)
    assert found["q4_k_m"].rise == pytest.approx(0.0243, abs=1e-4)
    assert found["awq-int4"].rise == pytest.approx(5.60 / 5.47 - 1)
    assert all(each.source for each in found.values())
