"""Exports of tiny models, opened by mlx_lm itself."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lighten.errors import Failure, RequestError
from lighten.export.mlx import families, proof
from lighten.export.mlx.proof import windows
from lighten.export.mlx.settings import Mlx
from lighten.facts import ModelFacts
from lighten.pipeline.recipe import Recipe
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.command import lighten
from tests.export.onnx.test_genai import quantized

mx: Any = pytest.importorskip("mlx.core")
mlx_lm: Any = pytest.importorskip("mlx_lm")

Tiny = Callable[..., Path]
IDS = np.random.default_rng(0).integers(0, 900, 40)
FACTS = ModelFacts("LlamaForCausalLM", 2, 256, 256, 4, 2, 64, 1006, False)


@torch.no_grad()
def expected(path: Path, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if weights:
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def export(source: Path, out: Path, form: str = "hf", **settings: Any) -> tuple[dict[str, Any], list[str]]:
    out.mkdir()
    context = Context()
    facts = Mlx(format="mlx", **settings).run(Artifact(source, {"format": form}), out, context)
    return facts, context.warnings


def widths(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization"]
    return found


def opened(folder: Path) -> Any:
    model, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.encode("naïve café")
    return model


def logits(model: Any) -> np.ndarray:
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(IDS)[None]))[0]


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", ["llama-bias", "llama-tied", "llama3", "mistral", "qwen2"])
def test_mlx_lm_opens_a_plain_model_and_computes_the_same(tiny: Tiny, tmp_path: Path, family: str) -> None:
    facts, warnings = export(tiny(family), tmp_path / "out")
    assert (facts["dtype"], warnings) == ("float32", [])
    assert off(logits(opened(tmp_path / "out")), expected(tiny(family))) < 1e-4
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization" not in config and config["tie_word_embeddings"] == (family == "llama-tied")


def test_other_types_of_number_are_counted_where_they_round(tiny: Tiny, tmp_path: Path) -> None:
    facts, warnings = export(tiny(), tmp_path / "half", dtype="float16")
    assert facts["dtype"] == "float16" and "of the plain weights were rounded to float16" in warnings[0]
    assert off(logits(opened(tmp_path / "half")), expected(tiny())) < 1e-2
    short = tiny(dtype=torch.bfloat16)
    facts, warnings = export(short, tmp_path / "short")
    assert (facts["dtype"], warnings) == ("bfloat16", [])
    large = tmp_path / "large"
    shutil.copytree(short, large)
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"model.norm.weight has weights beyond .*float16"):
        export(large, tmp_path / "none", dtype="float16")


@pytest.mark.parametrize(("bits", "group", "awq"), [(4, 64, False), (3, 128, False), (8, 32, False), (4, 64, True)])
def test_codes_of_gptq_and_awq_stay(tiny: Tiny, tmp_path: Path, bits: int, group: int, awq: bool) -> None:
    dense = quantized(tiny(), tmp_path / "q", bits, group=group, awq=awq, plain="k_proj")
    form = "awq" if awq else "gptq"
    facts, warnings = export(tmp_path / "q", tmp_path / "exact", form, dtype="float32")
    assert (facts["codes"], facts["off_by_steps"]) == ({"kept": len(dense), "unpacked": 0}, 0) and not warnings
    assert widths(tmp_path / "exact") == {"group_size": group, "bits": bits, "mode": "affine"}
    assert off(logits(opened(tmp_path / "exact")), expected(tiny(), dense)) < 1e-4
    facts, warnings = export(tmp_path / "q", tmp_path / "half", form)
    assert facts["dtype"] == "float16" and 0 < facts["off_by_steps"] < 2 ** (bits - 11)
    assert any("of a step: dtype: float32 moves none" in each for each in warnings)
    assert not (tmp_path / "half/quantize_config.json").exists()


def test_widths_of_their_own_have_entries_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    dense = quantized(tiny(), tmp_path / "q", 4, group=64)
    other = quantized(tiny(), tmp_path / "o", 8, group=64)
    tensors, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "o"))
    mine = "model.layers.0.mlp.down_proj"
    mixed = {name: wide[name] if name.startswith(mine) else each for name, each in tensors.items()}
    save_file(mixed, tmp_path / "q/model.safetensors", {"format": "pt"})
    dense[f"{mine}.weight"] = other[f"{mine}.weight"]
    facts, _ = export(tmp_path / "q", tmp_path / "out", "gptq", dtype="float32")
    usual = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert widths(tmp_path / "out") == {**usual, mine: {**usual, "bits": 8}}
    assert facts["modules"] == {"4 bits (affine, groups of 64)": 13, "8 bits (affine, groups of 64)": 1}
    assert off(logits(opened(tmp_path / "out")), expected(tiny(), dense)) < 1e-4


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"method": "rtn", "bits": 4, "group_size": -1}, {"group_size": 128, "bits": 4, "mode": "affine"}),
        (
            {"method": "rtn", "bits": 4, "group_size": 32, "ignore": ["*k_proj"]},
            {"group_size": 32, "bits": 4, "mode": "affine"},
        ),
        ({"method": "mxfp4", "rounding": "nearest"}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    ],
)
def test_what_lighten_quantizes_is_the_same_on_mlx(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], kept: dict[str, Any]
) -> None:
    (source := tmp_path / "q").mkdir()
    manifest = open_step("quantize", settings).run(Artifact(tiny(), {"format": "hf"}), source, Context())
    facts, _ = export(source, tmp_path / "out", manifest["format"], dtype="float32")
    assert widths(tmp_path / "out") == kept and facts["codes"]["unpacked"] == 0
    from lighten.model.unpacked import open_checkpoint

    checkpoint = open_checkpoint(source)
    dense = {f"{name}.weight": checkpoint.tensor(f"{name}.weight") for name in checkpoint.packed}  # type: ignore[attr-defined]
    assert off(logits(opened(tmp_path / "out")), expected(tiny(), dense)) < 1e-3


def test_what_mlx_cannot_hold_is_unpacked_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    (source := tmp_path / "q").mkdir()
    open_step("quantize", {"method": "fp8"}).run(Artifact(tiny(), {"format": "hf"}), source, Context())
    facts, warnings = export(source, tmp_path / "out", "compressed-tensors")
    assert facts["codes"] == {"kept": 0, "unpacked": 14} and "modules" not in facts
    assert any("14 linears of this compressed-tensors model have no form in MLX" in each for each in warnings)
    opened(tmp_path / "out")


@pytest.mark.parametrize(("bits", "settings"), [(4, {}), (6, {"group_size": 32}), (4, {"mode": "mxfp4"})])
def test_mlx_rounds_as_mlx_lm_convert_does(tiny: Tiny, tmp_path: Path, bits: int, settings: dict[str, Any]) -> None:
    given = settings if "mode" in settings else {"bits": bits, **settings}
    export(tiny(), tmp_path / "out", **given)
    group = 32 if settings else 64
    mlx_lm.convert(
        str(tiny()),
        str(tmp_path / "theirs"),
        quantize=True,
        q_bits=bits,
        q_group_size=group,
        q_mode=settings.get("mode", "affine"),
        dtype="float32",
    )
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)
    assert widths(tmp_path / "out") == {"group_size": group, "bits": bits, "mode": settings.get("mode", "affine")}
    model = opened(tmp_path / "out")
    assert off(logits(model), expected(tiny())) < 1


def test_embedding_and_head_have_a_width_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    export(tiny(), tmp_path / "float", bits=4, embedding="float")
    usual = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert widths(tmp_path / "float") == usual
    assert "lm_head.scales" not in load_file(tmp_path / "float/model.safetensors")
    quantized(tiny(), tmp_path / "q", 4)
    export(tmp_path / "q", tmp_path / "out", "gptq", embedding="int8", dtype="float32")
    eight = {**usual, "bits": 8}
    assert widths(tmp_path / "out") == {**usual, "model.embed_tokens": eight, "lm_head": eight}
    tensors = load_file(tmp_path / "out/model.safetensors")
    weight = mx.array(load_file(tiny() / "model.safetensors")["lm_head.weight"].numpy())
    words = np.array(mx.quantize(weight, group_size=64, bits=8)[0])
    assert np.array_equal(words, tensors["lm_head.weight"].view(torch.int32).numpy().view(np.uint32))
    opened(tmp_path / "out")


def test_a_window_that_mlx_lm_does_not_know_is_told(tiny: Tiny, tmp_path: Path) -> None:
    _, warnings = export(tiny("mistral", sliding_window=8), tmp_path / "out")
    assert "2 layers attend to the last 8 tokens, and in mlx_lm's class of mistral to all" in warnings[0]
    assert windows({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}) == (1, 8)
    assert windows({"sliding_window": 512, "max_position_embeddings": 512, "num_hidden_layers": 2}) == (0, 0)
    assert windows({"sliding_window": 8, "use_sliding_window": False, "num_hidden_layers": 2}) == (0, 0)
    assert windows({"text_config": {"sliding_window": 8, "num_hidden_layers": 2}}) == (2, 8)


def test_what_mlx_lm_does_not_open_is_a_failure(tiny: Tiny, tmp_path: Path) -> None:
    export(tiny(), tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "out/model.safetensors", {"format": "mlx"})
    with pytest.raises(Failure, match=r"mlx_lm's class of llama does not open what was written .*model.norm.weight"):
        proof.opened(tmp_path / "out", json.loads((tmp_path / "out/config.json").read_text()))


def test_settings() -> None:
    assert Mlx(format="mlx").promises()["limits"] == {"tokenizer": 1.0, "perplexity": 0.0005, "top1": 0.99}
    assert Mlx(format="mlx").rounded is False and Mlx(format="mlx", bits=4).rounded is True
    assert Mlx(format="mlx", dtype="float32").exact(FACTS) and not Mlx(format="mlx").exact(FACTS)
    wrong: tuple[dict[str, Any], ...] = (
        {"bits": 7},
        {"bits": 4, "group_size": 16},
        {"group_size": 64},
        {"mode": "affine"},
        {"mode": "mxfp4", "bits": 8},
    )
    for each in wrong:
        with pytest.raises(ValidationError):
            Mlx(format="mlx", **each)


def test_what_cannot_be_held_is_refused_in_words() -> None:
    odd = replace(FACTS, hidden=576, intermediate=1536)
    with pytest.raises(RequestError, match=r"groups of 128 do not divide .*hidden size 576.*set group_size: 64"):
        Mlx(format="mlx", bits=4, group_size=128).check(odd)
    with pytest.raises(RequestError, match=r"groups of 64 .*\(intermediate size 100\): export it without rounding"):
        Mlx(format="mlx", bits=4).check(replace(FACTS, intermediate=100))
    with pytest.raises(RequestError, match="kept as they are: leave out `bits`"):
        Mlx(format="mlx", bits=4).check_source("gptq", FACTS)
    with pytest.raises(RequestError, match="this one is mxfp4: mlx_lm opens that directory as it is"):
        Mlx(format="mlx").check_source("mxfp4", FACTS)
    with pytest.raises(RequestError, match="MLX export reads model directories"):
        Mlx(format="mlx").check_source("gguf", FACTS)
    with pytest.raises(RequestError, match="no class for the model type made-up"):
        families.check({"model_type": "made-up"})
    families.check({"model_type": "mistral"})


def test_act_order_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    quantized(tiny(), tmp_path / "q", 4, order=True)
    done = lighten("export", tmp_path / "q", "--format", "mlx", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2 and "desc_act: static" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    recipe = Recipe.model_validate(
        {
            "name": "m",
            "model": str(tiny()),
            "variants": {"m": [{"quantize": {"method": "gptq", "desc_act": True}}, {"export": {"format": "mlx"}}]},
        }
    )
    quantize, exporting = recipe.steps("m")
    with pytest.raises(RequestError, match="desc_act: true scatters them"):
        exporting.after(quantize)
    assert exporting.after(open_step("quantize", {"method": "gptq", "desc_act": "static"}))


def test_writing_what_is_not_rounded_needs_no_mlx(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mlx(format="mlx").requires() == [("mlx", "mlx"), ("mlx_lm", "mlx")]
    uncompared: dict[str, Any] = {"parity": {"tokens": 0}}
    assert Mlx(format="mlx", **uncompared).requires() == []
    assert Mlx(format="mlx", bits=4, **uncompared).requires()
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    for name in [each for each in sys.modules if each.partition(".")[0] in ("mlx", "mlx_lm")]:
        monkeypatch.setitem(sys.modules, name, None)
    _, warnings = export(tiny(), tmp_path / "out")
    assert warnings == ["MLX is not here: whether it knows this family, and opens the directory, was not tried"]
    with pytest.raises(RequestError, match=r"rounding to the grid of MLX needs .*lighten\[mlx\]"):
        export(tiny(), tmp_path / "other", bits=4)
