import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.export.executorch.settings import ExecuTorch
from lighten.export.executorch.step import place
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.onnx.test_genai import expected, off, quantized, rough
from tests.families.models import make

pytest.importorskip("executorch.exir")

Tiny = Callable[..., Path]
ToExecuTorch = Callable[..., Path]
IDS = np.random.default_rng(0).integers(0, 900, 40)


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("llama-tied", dtype=torch.bfloat16, num_hidden_layers=1)


def logits(folder: Path) -> np.ndarray:
    runtime = open_runtime(folder)
    found = runtime.logits(IDS).copy()
    runtime.close()
    return found


def test_settings() -> None:
    assert ExecuTorch(format="executorch").rounded and not ExecuTorch(format="executorch", type="fp32").rounded
    for wrong in ({"format": "onnx"}, {"format": "executorch", "type": "fp16"}, {"format": "executorch", "context": 1}):
        with pytest.raises(ValidationError):
            ExecuTorch(**wrong)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "gpt_oss", "mistral", "phi3", "gpt2"])
def test_a_model_with_its_cache_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    from lighten.export.executorch.cached import ATTENTION, Cached
    from lighten.model.executorch_library import load

    load("a test")
    path = make(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.from_numpy(IDS % model.config.vocab_size)[None]
    cached = Cached(model, 64)
    with torch.no_grad():
        wanted = plain(ids).logits[0].numpy()
        for part in (torch.tensor([0, 25, 26, 40]), torch.tensor([0, 7, 40])):  # a text, and another over it
            pairs = pairwise(part)
            found = torch.cat([cached(ids[:, first:last], first[None]) for first, last in pairs], 1)[0]
            assert off(found.numpy(), wanted) < 1e-5


def test_codes_of_a_checkpoint_are_kept(source: Path, to_executorch: ToExecuTorch, tmp_path: Path) -> None:
    dense = quantized(source, tmp_path / "gptq", order=True, plain="down_proj")
    out = to_executorch(tmp_path / "gptq", "gptq", context=64)
    assert rough(logits(out), expected(source, dense)) < 0.08  # inputs, embedding and head have 8 bits
    names = {file.name for file in out.iterdir()}
    assert {"model.pte", "tokenizer.json", "tokenizer_config.json", "config.json"} <= names
    facts = json.loads((out / "facts.json").read_text())
    assert facts["weights"] == "kept from gptq" and facts["weights_in_codes"] == sum(
        each.numel() for each in dense.values()
    )
    assert facts["head_rounding"] == "gptq" and 0 < facts["inputs_cost"] <= facts["inputs_cost_together"]
    assert facts["context"] == 64 and facts["xnnpack_parts"] > 0 and facts["operators_outside"] > 0
    assert any("bfloat16" in line for line in json.loads((out / "warnings.json").read_text()))


@pytest.mark.parametrize(("family", "type", "most"), [("llama", "int8", 0.08), ("gemma3_text", "int4", 0.5)])
def test_weights_are_rounded_and_rows_that_are_multiplied(tmp_path: Path, family: str, type: Any, most: float) -> None:
    from lighten.model.executorch_library import load

    load("a test")
    model = AutoModelForCausalLM.from_pretrained(make(family, tmp_path), dtype=torch.float32).eval()
    ids = torch.from_numpy(IDS % model.config.vocab_size)[None]
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
        facts = place(ExecuTorch(format="executorch", type=type), model, None)
        assert facts["head_rounding"].startswith("nearest, as no text")
        assert 1e-4 < rough(model(ids).logits[0].numpy(), wanted) < most
    assert facts["weights_in_floats"] == 0 and facts["weights_of_embedding_in_codes"] > 0


@pytest.mark.parametrize(("type", "count"), [("int8", 1 + 7), ("int4", 1)])
def test_linears_of_8_bits_that_are_rounded_here_divide_their_inputs(source: Path, type: Any, count: int) -> None:
    from lighten.export.executorch.linears import CodedLinear
    from lighten.model.executorch_library import load

    load("a test")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.from_numpy(IDS % model.config.vocab_size)[None]
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
        facts = place(ExecuTorch(format="executorch", type=type), model, None, ids)
        assert rough(model(ids).logits[0].numpy(), wanted) < (0.08 if type == "int8" else 0.5)
    assert facts["head_rounding"] == "gptq"
    coded = {name: each for name, each in model.named_modules() if isinstance(each, CodedLinear)}
    assert len(coded) == 8 and "lm_head" in coded
    assert sum(each.evener is not None for each in coded.values()) == count
    layer = model.model.layers[0]
    if type == "int8":  # linears that read the same inputs divide them by the same, once
        for first, *others in (
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            (layer.mlp.gate_proj, layer.mlp.up_proj),
        ):
            assert all(each.names[2] == first.names[2] for each in others)


def test_requests_that_are_refused(source: Path, to_executorch: ToExecuTorch, tmp_path: Path) -> None:
    quantized(source, tmp_path / "gptq", group=16)
    with pytest.raises(Failure, match="multiples of 32"):
        to_executorch(tmp_path / "gptq", "gptq")
    facts = Checkpoint(source).facts
    for settings, form, said in (
        ({}, "gguf", "export the model"),
        ({}, "bitsandbytes", "rounded twice"),
        ({"context": 4096}, "hf", "512 positions"),
    ):
        step = ExecuTorch(format="executorch", **settings)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=said):
            step.check(facts)
            step.check_source(form, facts)


@pytest.mark.parametrize("family", ["falcon_h1", "mamba"])
def test_a_model_that_keeps_more_than_keys_and_values(family: str, tmp_path: Path) -> None:
    step, out = ExecuTorch(format="executorch", type="fp32"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(Failure, match="form in ExecuTorch"):
        step.run(Artifact(make(family, tmp_path / family), {"format": "hf"}), out, Context())
