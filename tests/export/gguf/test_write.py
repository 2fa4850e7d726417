import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime
from lighten.export.gguf import quantize as gguf_quantize
from lighten.export.gguf import write as export
from lighten.export.gguf.types import PLAIN, TYPES
from lighten.model.gguf.towers import model_of

Tiny = Callable[..., Path]


def logits_of(file: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    runtime = LlamaCppRuntime(file, "cpu", float32_cache=True)
    try:
        return runtime.logits(np.array(ids)).copy()
    finally:
        runtime.close()


def quantized(tiny: Tiny, folder: Path, type: str, imatrix: Any = None) -> Path:
    plain, out = folder / "plain.gguf", folder / f"{type}.gguf"
    export.write(tiny(), plain)
    gguf_quantize.quantize(plain, out, type, imatrix)
    return out


@pytest.mark.parametrize(
    "family", ["llama", "llama-bias", "llama-tied", "llama3", "linear", "yarn", "yarn-factor", "mistral", "qwen2"]
)
def test_logits_are_those_of_transformers(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source = tiny(family)
    export.write(source, tmp_path / "m.gguf", "F32")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    found = logits_of(tmp_path / "m.gguf", ids[0].tolist())
    cosine = (found * expected).sum(-1) / (np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1))
    assert cosine.min() > 0.999999


@pytest.mark.parametrize("older", [{}, {"rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_reads_the_rotation_of_older_configs(tiny: Tiny, tmp_path: Path, older: dict[str, Any]) -> None:
    source = shutil.copytree(tiny(), tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0} | older))
    export.write(source, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["llama.rope.freq_base"].contents() == 77.0
    assert ("llama.rope.scaling.factor" in fields) == ("rope_scaling" in older)


def test_metadata(tiny: Tiny, tmp_path: Path) -> None:
    about = {"name": "Tiny", "license": "apache-2.0", "source": "someone/tiny"}
    export.write(tiny(), tmp_path / "m.gguf", "F16", about=about)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "general.source.repo_url": "https://huggingface.co/someone/tiny",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.context_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.freq_base": 1e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: reader.fields[key].contents() for key in expected} == expected
    assert "messages" in reader.fields["tokenizer.chat_template"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [3, 3, 3, 1]
    assert types[-6:] == [4, 5, 5, 5, 5, 5]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16"}


def test_keeps_the_stored_type(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(dtype=torch.bfloat16)
    export.write(source, tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    down = tensors["blk.1.ffn_down.weight"]
    expected = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert down.tensor_type.name == "BF16"
    assert np.array_equal(down.data.view(np.int16), expected.view(torch.int16).numpy())


def test_two_writes_give_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        quantized(tiny, tmp_path / name, "Q4_K_M")
    for file in ("plain.gguf", "Q4_K_M.gguf"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["Q4_K_M.gguf", "plain.gguf"]


def gguf_weights(tiny: Tiny) -> dict[str, Any]:
    """Returns an importance matrix in which all channels weigh the same."""
    names = [hf for hf in export.Draft(tiny()).names.values() if hf.startswith("blk") and "norm" not in hf]
    return dict.fromkeys(names, np.ones(256, dtype=np.float32))


def closeness(type: str) -> float:
    """Returns the correlation of logits that a type must reach on random weights, which round worst."""
    for start, least in (("IQ1", 0.05), ("TQ", -1.0), ("IQ2", 0.1), ("Q2", 0.2), ("IQ3", 0.4), ("Q3", 0.55)):
        if type.startswith(start):
            return least
    return 0.8


@pytest.mark.parametrize("type", [type for type in TYPES if type not in (*PLAIN, "IQ1_M")])  # IQ1_M: 20 s
def test_every_type_loads_and_stays_close(tiny: Tiny, tmp_path: Path, type: str) -> None:
    weights = gguf_weights(tiny) if TYPES[type].needs_imatrix else None
    file = quantized(tiny, tmp_path, type, weights)
    ids = list(range(3, 67))
    expected, found = logits_of(tmp_path / "plain.gguf", ids), logits_of(file, ids)
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > closeness(type)
    facts = gguf_quantize.describe(file, type)
    assert facts["fallbacks"] == {"count": 0, "of": 21}
    assert facts["tensor_types"]["F32"] == 5
    tensors = gguf.GGUFReader(file).tensors
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    assert facts["bits_per_weight"] == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_fallbacks_are_those_llama_cpp_counts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    source = tiny("llama-tied" if tied else "llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=1)
    export.write(source, tmp_path / "plain.gguf")
    log = gguf_quantize._log
    steps: list[tuple[int, int, str]] = []
    lines: list[str] = []

    @contextlib.contextmanager
    def listening(*given: Any) -> Any:
        with log(*given) as said:
            yield said
            lines.extend(said)

    monkeypatch.setattr(gguf_quantize, "_log", listening)
    gguf_quantize.quantize(
        tmp_path / "plain.gguf", tmp_path / "q.gguf", "Q4_K_M", None, lambda *step: steps.append(step)
    )
    facts = gguf_quantize.describe(tmp_path / "q.gguf", "Q4_K_M")["fallbacks"]
    assert any(f"{facts['count']} of {facts['of']} tensor(s) required fallback" in line for line in lines)
    assert facts["tensors"].pop("token_embd", None) == (None if tied else 1)
    assert facts["tensors"] == {"attn_k": 2, "attn_output": 2, "attn_q": 2, "attn_v": 2, "ffn_gate": 2, "ffn_up": 2}
    assert steps[-1][:2] == (facts["of"], facts["of"])


@pytest.mark.parametrize("type", ["IQ4_XS", "TQ2_0", "Q2_K"])
def test_fallbacks_are_counted_for_every_type_with_blocks_of_256(tiny: Tiny, tmp_path: Path, type: Any) -> None:
    source = tiny("llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=1)
    export.write(source, tmp_path / "plain.gguf")
    gguf_quantize.quantize(tmp_path / "plain.gguf", tmp_path / "q.gguf", type, None)
    facts = gguf_quantize.describe(tmp_path / "q.gguf", type)
    assert facts["fallbacks"]["count"] == 13  # six of each layer, and the embedding


def test_importance_changes_the_rounding(tiny: Tiny, tmp_path: Path) -> None:
    name, weights = "blk.0.attn_q.weight", np.geomspace(1e-3, 1e3, 256).astype(np.float32)
    errors = []
    for case, imatrix in (("without", None), ("with", {name: weights})):
        (tmp_path / case).mkdir()
        tensors = gguf.GGUFReader(quantized(tiny, tmp_path / case, "Q4_K_M", imatrix)).tensors
        rounded = next(gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors if tensor.name == name)
        plain = gguf.GGUFReader(tmp_path / case / "plain.gguf").tensors
        original = next(tensor.data for tensor in plain if tensor.name == name)
        errors.append(float((weights * (rounded - original) ** 2).sum()))
    assert errors[1] < errors[0]


def test_importance_is_the_mean_square(tiny: Tiny, tmp_path: Path) -> None:
    from lighten.model.grams import Gram, GramWriter

    model = model_of(tiny())
    rows = torch.randn(40, 256) * torch.linspace(0, 3, 256)
    writer = GramWriter(tmp_path, [f"model.layers.{n}." for n in range(8)], {})
    for _ in range(model.facts.layers):
        gram = Gram.empty(256, "cpu")
        gram.blocks = torch.cat([(rows.T @ rows).reshape(-1)])
        gram.tokens = 40
        writer.add({"in": gram}, {"self_attn.q_proj": "in", "mlp.down_proj": "in"})
    writer.close(torch.zeros(1, 8), [])
    found = gguf_quantize.importance(tmp_path, model)
    assert sorted(found) == [f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn_q", "ffn_down")]
    mean = rows.square().mean(0).numpy()
    assert np.allclose(found["blk.1.ffn_down.weight"][1:], mean[1:], rtol=1e-4)
    assert found["blk.1.ffn_down.weight"][0] == pytest.approx(mean.mean() * 1e-6, rel=1e-3)


def test_importance_of_nothing_but_zeros(tiny: Tiny, tmp_path: Path) -> None:
    weights = {"blk.0.attn_q.weight": np.full(256, 1e-30, np.float32)}
    assert logits_of(quantized(tiny, tmp_path, "Q4_K_M", weights), [1, 2, 3]).std() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "default, linear, yarn and llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}}, "beta_fast"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refuses_what_llama_cpp_cannot_express(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = shutil.copytree(tiny(), tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(RequestError, match=message):
        export.write(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def with_tensors(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    copy = shutil.copytree(source, folder)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_unknown_and_missing_tensors(tiny: Tiny, tmp_path: Path) -> None:
    extra = with_tensors(
        tiny(), tmp_path / "extra", lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(64)})
    )
    with pytest.raises(RequestError, match=r"no place for the tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        export.write(extra, tmp_path / "m.gguf")
    short = with_tensors(tiny(), tmp_path / "short", lambda t: t.__delitem__("lm_head.weight"))
    with pytest.raises(Failure, match=r"lm_head\.weight is missing"):
        export.write(short, tmp_path / "m.gguf")


@pytest.mark.parametrize(("value", "type"), [(float("nan"), "F32"), (float("inf"), "BF16"), (1e6, "F16")])
def test_names_the_tensor_that_does_not_fit(tiny: Tiny, tmp_path: Path, value: float, type: Any) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    source = with_tensors(tiny(), tmp_path / "hf", spoil)
    with pytest.raises(Failure, match=rf"model\.layers\.1\.mlp\.up_proj\.weight holds .* {type}"):
        export.write(source, tmp_path / "m.gguf", type)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_says_why_llama_cpp_failed(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(Failure, match=r"could not quantize m\.gguf to Q8_0: .*load"):
        gguf_quantize.quantize(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q8_0")
    assert not list(tmp_path.glob(".*"))


def test_pickled_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny(), tmp_path / "hf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(RequestError, match="pickled"):
        export.write(source, tmp_path / "m.gguf")


def test_warns_of_a_sliding_window(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("mistral", sliding_window=64)
    assert "last 64 tokens" in export.write(source, tmp_path / "m.gguf")[0]
