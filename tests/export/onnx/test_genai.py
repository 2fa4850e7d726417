import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime_genai
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.export.onnx import weights as onnx_weights
from lighten.export.onnx.settings import Onnx
from lighten.facts import ModelFacts
from lighten.model.packing import pack_awq, pack_gptq
from lighten.step import Context
from lighten.store.artifact import Artifact

Tiny = Callable[..., Path]
ToOnnx = Callable[..., Path]
IDS = np.random.default_rng(0).integers(0, 900, 40)
EXACT: dict[str, Any] = {"accuracy_level": 1, "embedding": "float"}
FACTS = ModelFacts("LlamaForCausalLM", 2, 256, 256, 4, 2, 64, 1006, False)


def logits(path: Path) -> np.ndarray:
    runtime = open_runtime(path)
    found = runtime.logits(IDS).copy()
    runtime.close()
    return found


@torch.no_grad()
def expected(path: Path, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if weights:
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
    return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def rough(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).mean() / np.square(wanted).mean()) ** 0.5


def rounded(weight: torch.Tensor, bits: int, block: int = 32) -> torch.Tensor:
    """Rounds to the nearest multiple of a block's scale, the farthest weight to the lowest code, block by block."""
    half = 2 ** (bits - 1)
    for part in (found := weight.float().clone()).view(-1, block):
        scale = max(part.tolist(), key=abs) / -half
        part.copy_((part / scale).round().clamp(-half, half - 1) * scale)
    return found


def operators(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path / "model.onnx", load_external_data=False).graph.node)


def quantized(
    source: Path, out: Path, bits: int = 4, *, group: int = 64, order: bool = False, awq: bool = False, plain: str = "-"
) -> dict[str, torch.Tensor]:
    """Writes a copy whose linears, but for those named `plain`, are random codes; returns what the codes stand for."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(bits)
    stored, dense = dict(tensors), {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight") or plain in name:
            continue
        linear, (outputs, inputs) = name.removesuffix(".weight"), weight.shape
        g_idx = torch.arange(inputs) // group
        if order:  # the same for linears that share their inputs
            g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
        codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(1, 2**bits, (inputs // group, outputs), generator=generator)
        scales = (0.05 + 0.1 * torch.rand(inputs // group, outputs, generator=generator)).half() / 2**bits
        dense[name] = ((codes - zeros[g_idx]).float() * scales[g_idx].float()).t()
        packed = pack_awq(codes, scales, zeros) if awq else pack_gptq(codes, scales, zeros, g_idx, bits)
        del stored[name]
        stored |= {f"{linear}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq" if awq else "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": order,
        "version": "gemm",
    }
    (out / "config.json").write_text(json.dumps(config))
    return dense


def test_settings() -> None:
    step = Onnx(format="onnx")
    assert (step.resolved_graph(FACTS), step.resolved_precision(FACTS)) == ("genai", "int4")
    bert = ModelFacts("BertModel", 2, 256, 256, 4, 4, 64, 1006, True, "encoder")
    assert (step.resolved_graph(bert), step.resolved_precision(bert)) == ("plain", "fp32")
    opt = replace(FACTS, architecture="OPTForCausalLM")
    assert (step.resolved_graph(opt), step.resolved_precision(opt)) == ("plain", "fp32")
    step.check(FACTS)
    step.check(bert)
    for wrong in ({"format": "gguf"}, {"format": "onnx", "precision": "int5"}, {"format": "onnx", "block_size": 48}):
        with pytest.raises(ValidationError):
            Onnx(**wrong)


@pytest.mark.parametrize(
    ("settings", "architecture", "message"),
    [
        (
            {"graph": "genai"},
            "OPTForCausalLM",
            "does not know OPTForCausalLM; it knows .*Llama.*graph: plain",
        ),
        ({"precision": "int4"}, "OPTForCausalLM", "a plain graph of OPTForCausalLM has no int4: use .*, int8$"),
        ({"precision": "bf16"}, "LlamaForCausalLM", "no bf16 arithmetic on CPUs"),
        ({"graph": "plain", "precision": "int4"}, "LlamaForCausalLM", "one of fp32, fp16, int8, or graph: genai"),
        ({"graph": "plain", "provider": "cuda"}, "LlamaForCausalLM", "leave out `provider`"),
    ],
)
def test_refuses_what_no_graph_holds(settings: dict[str, Any], architecture: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Onnx(format="onnx", **settings).check(ModelFacts(architecture, 2, 256, 256, 4, 2, 64, 1006, False))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_float32_is_the_model(tiny: Tiny, to_onnx: ToOnnx, family: str) -> None:
    out = to_onnx(tiny(family), precision="fp32")
    assert off(logits(out), expected(tiny(family))) < 1e-5
    names = {file.name for file in out.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "config.json"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_the_same_model_gives_the_same_bytes(tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path) -> None:
    first = to_onnx(tiny("llama-tied"))
    source = shutil.copytree(tiny("llama-tied"), tmp_path / "elsewhere")
    second = to_onnx(source)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    assert str(tmp_path).encode() not in (second / "model.onnx").read_bytes()
    made = onnx.load(first / "model.onnx", load_external_data=False)
    package = f"{onnxruntime_genai.__version__}+{onnxruntime_genai.__commit__[:7]}"
    assert made.producer_version == package, "the commit of a checkout around the environment is none of the file's"


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_int4_keeps_embedding_and_head_at_8_bits(tiny: Tiny, to_onnx: ToOnnx, family: str) -> None:
    kept = to_onnx(tiny(family))
    nodes = {node.name: node for node in operators(kept)}
    bits = {
        name: attribute.i for name, node in nodes.items() for attribute in node.attribute if attribute.name == "bits"
    }
    assert bits.pop("/lm_head/MatMulNBits") == bits.pop("/model/embed_tokens/GatherBlockQuantized") == 8
    assert set(bits.values()) == {4}
    assert len(bits) == 2 * 5  # queries, keys and values are one
    facts = json.loads((kept / "facts.json").read_text())
    size = sum((1 if family == "llama-tied" else 2) * part for part in (1006 * 256, 1006 * 8 * 4))
    assert facts["embedding_bytes"] == pytest.approx(size, abs=64)
    assert facts["embedding_over_int4_bytes"] == pytest.approx(size * (36 - 20) / 36, abs=64)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_embedding_and_head_cost_what_their_precision_says(tiny: Tiny, to_onnx: ToOnnx, family: str) -> None:
    wanted = expected(tiny(family))
    kinds = ("float", "int8", "int4")
    found = [logits(to_onnx(tiny(family), ignore=("*",), accuracy_level=1, embedding=kind)) for kind in kinds]
    gaps = [rough(each, wanted) for each in found]
    assert gaps[0] < 1e-5
    assert gaps[1] < 0.05
    stored = load_file(tiny(family) / "model.safetensors")
    names = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in stored]
    assert off(found[1], expected(tiny(family), {name: rounded(stored[name], 8) for name in names})) < 1e-4
    if family == "llama-tied":  # of two tables the builder's int4 rounds the head only: not the same to compare with
        assert gaps[1] < gaps[2] / 5


def test_what_is_ignored_stays_a_plain_product(tiny: Tiny, to_onnx: ToOnnx) -> None:
    out = to_onnx(tiny(), ignore=("*.1.mlp.down_proj", "re:.*layers.0.*o_proj"), block_size=64, symmetric=False)
    nodes = operators(out)
    left = sorted(node.name for node in nodes if node.op_type == "MatMul")
    assert left == ["/model/layers.0/attn/o_proj/MatMul", "/model/layers.1/mlp/down_proj/MatMul"]
    rounded = [node for node in nodes if node.op_type == "MatMulNBits" and "lm_head" not in node.name]
    assert all(len(node.input) == 4 for node in rounded)  # with zero points
    with pytest.raises(RequestError, match=r"no linear is called '\*\.7\.\*'; names are such as model.layers.0"):
        to_onnx(tiny(), ignore=("*.7.*",))


def test_int8_is_closer_than_int4(tiny: Tiny, to_onnx: ToOnnx) -> None:
    wanted = expected(tiny())
    eight, four = (logits(to_onnx(tiny(), precision=precision, **EXACT)) for precision in ("int8", "int4"))
    assert rough(eight, wanted) < 0.05
    assert rough(eight, wanted) < rough(four, wanted) / 5


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 8}, {"bits": 3}, {"bits": 2}, {"order": True}, {"awq": True}, {"plain": "k_proj"}, {"group": 256}],
    ids=str,
)
def test_weights_of_a_checkpoint_are_kept(
    tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path, settings: dict[str, Any]
) -> None:
    dense = quantized(tiny("llama-tied"), tmp_path / "q", **settings)
    out = to_onnx(tmp_path / "q", "awq" if settings.get("awq") else "gptq", **EXACT)
    assert off(logits(out), expected(tiny("llama-tied"), dense)) < 1e-5
    facts = json.loads((out / "facts.json").read_text())
    assert facts["weights"] == f"kept from {'awq' if settings.get('awq') else 'gptq'}"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_embedding_and_head_beside_kept_weights_are_rounded_as_asked(
    tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path, family: str
) -> None:
    dense = quantized(tiny(family), tmp_path / "q")
    stored = load_file(tiny(family) / "model.safetensors")
    tables = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in stored]
    for bits in (4, 8):
        out = to_onnx(tmp_path / "q", "gptq", accuracy_level=1, embedding=f"int{bits}")
        wanted = expected(tiny(family), {**dense, **{name: rounded(stored[name], bits) for name in tables}})
        assert off(logits(out), wanted) < 1e-4, bits
        size = len(tables) * 1006 * (256 * bits // 8 + 8 * 4)
        assert json.loads((out / "facts.json").read_text())["embedding_bytes"] == pytest.approx(size, abs=64)


def test_blocks_stand_for_the_weights_of_the_checkpoint() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (96, 5), generator=generator)
    scales, zeros = torch.rand(3, 5, generator=generator), torch.randint(0, 16, (3, 5), generator=generator)
    g_idx = torch.arange(96) // 32
    found = onnx_weights.Codes(codes, scales, zeros, g_idx, 4)
    packed = onnx_weights.pack(found, "x")
    assert (packed.block_size, packed.blocks.shape) == (32, (5, 3, 16))
    assert packed.zeros is not None
    low, high = packed.blocks.flatten(1) & 15, packed.blocks.flatten(1) >> 4
    unpacked = torch.stack([low, high], -1).flatten(1).float()
    points = torch.stack([packed.zeros & 15, packed.zeros >> 4], -1).flatten(1)[:, :3].float()
    weight = (unpacked.view(5, 3, 32) - points[..., None]) * packed.scales[..., None]
    assert torch.equal(weight.flatten(1), found.weight())
    with pytest.raises(Failure, match="x has groups that cannot be cut into blocks of 16"):
        onnx_weights.pack(
            onnx_weights.Codes(codes, scales.repeat(4, 1), zeros.repeat(4, 1), torch.arange(96) // 8, 4), "x"
        )


def test_refuses_other_sources_and_other_precisions(tiny: Tiny, tmp_path: Path) -> None:
    for format, settings, message in (
        ("gguf", {}, "made of unquantized, GPTQ and AWQ models, this one is gguf: set graph: plain"),
        ("gptq", {"precision": "fp32"}, "kept as they are: leave out precision fp32"),
        ("awq", {"ignore": ("*",)}, "leave out `ignore`"),
        ("bundle", {"graph": "plain"}, "made of unquantized, GPTQ and AWQ models, this one is bundle"),
    ):
        with pytest.raises(RequestError, match=message):
            Onnx(format="onnx", **settings).run(Artifact(tiny(), {"format": format}), tmp_path, Context())
    assert list(tmp_path.iterdir()) == []


def test_a_refusing_builder_is_one_message_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = pytest.importorskip("onnxruntime_genai.models.builder")

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("The model is not currently supported.")

    monkeypatch.setattr(builder, "create_model", refuse)
    with pytest.raises(RequestError, match=r"builder refuses .*not currently supported"):
        Onnx(format="onnx").run(Artifact(tiny(), {"format": "hf"}), tmp_path, Context())
    assert list(tmp_path.iterdir()) == []


def test_the_graph_for_cuda_is_in_float16(tiny: Tiny, to_onnx: ToOnnx) -> None:
    model = onnx_ir.load(to_onnx(tiny("llama-tied"), provider="cuda") / "model.onnx")
    kinds = {value.dtype for value in model.graph.initializers.values() if str(value.name).endswith("scales")}
    assert kinds == {onnx_ir.DataType.FLOAT16}
