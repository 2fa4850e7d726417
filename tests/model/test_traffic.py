"""Bytes and operations of a token, against the tensors themselves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.export.gguf import write as export
from lighten.model.source import find
from lighten.model.traffic import Traffic, traffic

Tiny = Callable[..., Path]


def of(path: Path, dtype: str = "float32") -> Traffic:
    return traffic(path, find(str(path)).facts, dtype)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_directory_reads_all_but_an_embedding_that_is_no_head(tiny: Tiny, family: str) -> None:
    tensors = load_file(tiny(family) / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    count = sum(tensor.numel() for tensor in tensors.values())
    if family == "llama":
        count += embedding.shape[1] - embedding.numel()
    assert of(tiny(family)).weights == 4 * count
    assert of(tiny(family), "bfloat16").weights == 2 * count


def test_what_is_packed_counts_as_it_is_stored(tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny() / "model.safetensors")
    before = sum(4 * tensor.numel() for name, tensor in tensors.items() if "q_proj" in name)
    packed = {n: torch.zeros(100, dtype=torch.int32) if "q_proj" in n else t for n, t in tensors.items()}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny() / "config.json").read_text())
    found = traffic(tmp_path, find(str(tiny())).facts, "float32")
    assert found.weights == of(tiny()).weights - before + 2 * 400


def test_products_are_those_of_the_linear_layers(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny())
    linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = of(tiny())
    assert found.head == linears.pop("lm_head")
    assert found.products == sum(linears.values())
    assert found.attention == 4 * 2 * 4 * 64  # QKᵀ and AV, two operations each: layers, heads, width of a head
    assert (found.cache_bytes, of(tiny(), "bfloat16").cache_bytes) == (2 * 2 * 2 * 64 * 4, 2 * 2 * 2 * 64 * 2)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_gguf_file_reads_what_its_directory_does(tiny: Tiny, family: str, tmp_path: Path) -> None:
    export.write(tiny(family), tmp_path / "tiny.gguf", "F32")
    found, expected = of(tmp_path / "tiny.gguf"), of(tiny(family))
    assert found.weights == pytest.approx(expected.weights, rel=0.001)
    assert replace(found, weights=0, cache_bytes=0) == replace(expected, weights=0, cache_bytes=0)
    assert found.cache_bytes == expected.cache_bytes / 2  # llama.cpp keeps keys and values in 16 bits
    assert traffic(tmp_path, find(str(tiny(family))).facts, "float32") == found


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("llama-tied", "fp32"), ("llama", "int4")])
def test_a_graph_reads_its_constants(tiny: Tiny, to_onnx: Callable[..., Path], family: str, precision: str) -> None:
    folder = to_onnx(tiny(family), precision=precision)
    found = of(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.onnx.data"))
    expected = of(tiny(family)).weights
    if precision == "fp32":
        assert found.weights == pytest.approx(expected, rel=0.1)
    else:
        assert found.weights < 0.5 * expected
    assert found.weights <= size * 1.05
    assert found.products == of(tiny(family)).products
    inputs = onnx.load(folder / "model.onnx", load_external_data=False).graph.input
    kinds = {each.type.tensor_type.elem_type for each in inputs if "past" in each.name}
    assert found.cache_bytes == (2 * 2 * 2 * 64) * {1: 4, 10: 2}[kinds.pop()]
