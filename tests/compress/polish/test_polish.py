"""Polishing of small models: what changes in the files, what survives a kill, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.compress.distill.teacher import Teacher
from lighten.compress.polish.settings import Polish
from lighten.errors import RequestError
from lighten.model import whole
from lighten.model.checkpoint import Checkpoint
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTH = 32
QUICK = {"batch_tokens": 4 * LENGTH, "steps": 8, "lr": 5e-3, "validate_every": 2}
RTN = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", dtype=torch.bfloat16, **SHAPE)


def quantized(source: Path, out: Path, **settings: Any) -> Artifact:
    out.mkdir(parents=True)
    step = open_step("quantize", {**RTN, **settings})
    facts = step.run(Artifact(source, {"format": "hf"}), out, Context())
    return Artifact(out, {"format": facts["format"], "facts": facts})


def polish(
    given: Artifact, source: Path, folder: Path, stop_after: int | None = None, **settings: Any
) -> tuple[dict[str, Any], Path]:
    """Runs the stages as the pipeline does; `stop_after` raises after so many steps of training."""
    step = Polish.model_validate({**QUICK, **settings})
    lessons, scratch, out = folder / "lessons", folder / "scratch", folder / "out"
    if not lessons.exists():
        lessons.mkdir(parents=True)
        cut = step.lessons().model_copy(update={"samples": 24, "length": LENGTH})
        assert isinstance(cut, Teacher)
        cut.run(Artifact(source, {}), lessons, Context())
    scratch.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    def report(done: int, total: int, note: str) -> None:
        assert done <= total
        if stop_after is not None and note.startswith(f"step {stop_after}/"):
            raise KeyboardInterrupt

    context = Context(report, teacher=source, lessons=lessons, scratch=scratch)
    facts = step.run(given, out, context)
    json.dumps(facts, allow_nan=False)
    return {**facts, "warnings": context.warnings}, out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.weight_map}


def divergence(folder: Path, source: Path, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        ours, theirs = (torch.log_softmax(whole.load(each, torch.float32)(ids).logits, -1) for each in (folder, source))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({}, "gptq"),
        ({"bits": 3, "sym": False}, "gptq"),
        ({"bits": 2, "group_size": 32, "ignore": ["*.0.mlp.*"]}, "compressed-tensors"),
        ({"bits": 4, "group_size": -1}, "gptq"),
    ],
    ids=["4", "3-asym", "2-mixed", "rows"],
)
def test_scales_change_and_nothing_else(source: Path, tmp_path: Path, settings: dict[str, Any], form: str) -> None:
    given = quantized(source, tmp_path / "q", **settings)
    facts, out = polish(given, source, tmp_path)
    assert facts["format"] == given.format == form and facts["bits"] == given.facts["bits"]
    before, after = tensors(given.path), tensors(out)
    assert list(before) == list(after)
    other = [name for name in before if not torch.equal(before[name], after[name])]
    assert other and all(name.endswith(("scales", "weight_scale")) for name in other)
    assert all(before[name].dtype == after[name].dtype and before[name].shape == after[name].shape for name in before)
    told = facts["polish"]
    changed = sum(int((before[name] != after[name]).sum()) for name in other)
    assert told["scales_changed"]["count"] == changed <= told["scales_changed"]["of"]
    assert told["linears"] == facts["quantized_linears"] and "left" not in told
    assert told["kl_after"] < told["kl_before"] and told["steps"] == 8
    for file in ("config.json", "tokenizer.json", *(["quantize_config.json"] if form == "gptq" else [])):
        assert (out / file).read_bytes() == (given.path / file).read_bytes()


def test_what_is_told_is_what_the_files_give(source: Path, tmp_path: Path) -> None:
    """Opened anew in float32, on the tokens that were held out."""
    from lighten.compress.distill.teacher import Lessons

    given = quantized(source, tmp_path / "q", bits=2)
    facts, out = polish(given, source, tmp_path)
    lessons = Lessons(tmp_path / "lessons")
    ids = lessons.ids[-int(lessons.facts["held_out"]) :]
    told = facts["polish"]
    for folder, name in ((given.path, "kl_before"), (out, "kl_after")):
        assert divergence(folder, source, ids[:, :-1]) == pytest.approx(told[name], rel=0.03)
    assert told["held_out_tokens"] == ids[:, 1:].numel()


@pytest.mark.parametrize("stop_after", [3, 5])
def test_an_interrupted_training_ends_in_the_same_files(source: Path, tmp_path: Path, stop_after: int) -> None:
    given = quantized(source, tmp_path / "q", bits=2)
    whole_, out = polish(given, source, tmp_path / "whole", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        polish(given, source, tmp_path / "broken", stop_after, save_every=2)
    left = [path.name for path in (tmp_path / "broken/scratch").glob("checkpoint-*")]
    assert left == [f"checkpoint-{2 * ((stop_after - 1) // 2):08d}"]
    again, resumed = polish(given, source, tmp_path / "broken", save_every=2)
    assert (out / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert whole_ == again


def test_what_the_source_writes_is_learnt_from_and_not_held_out(source: Path, tmp_path: Path) -> None:
    given = quantized(source, tmp_path / "q")
    facts, out = polish(given, source, tmp_path, written=8, steps=None, epochs=1.0)
    told = facts["polish"]
    held = round(0.06 * 24)
    assert told["held_out_tokens"] == held * (LENGTH - 1)
    assert told["trained_tokens"] == round((24 - held + 8) / 4) * 4 * LENGTH
    assert told["kl_after"] < told["kl_before"]
    plain, alone = polish(given, source, tmp_path / "alone", steps=None, epochs=1.0)
    assert plain["polish"]["kl_before"] == told["kl_before"]  # the same text is held out
    assert any(not torch.equal(each, tensors(alone)[name]) for name, each in tensors(out).items())
    without, more = (Polish(written=count) for count in (0, 8))
    assert without.key_config() == more.key_config()
    assert without.lessons().key_config() != more.lessons().key_config()


def test_scales_that_nothing_improves_are_kept(source: Path, tmp_path: Path) -> None:
    given = quantized(source, tmp_path / "q", bits=8)
    facts, out = polish(given, source, tmp_path, lr=0.5, warmup=0, patience=1, validate_every=1)
    before, after = tensors(given.path), tensors(out)
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert facts["polish"]["scales_changed"]["count"] == 0 and facts["polish"]["steps"] == 1
    assert facts["polish"]["kl_after"] == facts["polish"]["kl_before"]
    assert "they were kept" in facts["warnings"][0]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_other_families(tmp_path: Path, family: str) -> None:
    (tmp_path / "model").mkdir()
    make(family, tmp_path / "model")
    given = quantized(tmp_path / "model", tmp_path / "q", bits=2)
    facts, out = polish(given, tmp_path / "model", tmp_path)
    told = facts["polish"]
    assert told["kl_after"] < told["kl_before"]
    assert told["linears"] + len(told.get("left", [])) == facts["quantized_linears"]
    assert bool(told.get("left")) == (family == "qwen3_moe")
    assert all("experts" in each["what"] and each["why"] for each in told.get("left", []))
    kept = {each["what"] for each in told.get("left", [])}
    before, after = tensors(given.path), tensors(out)
    assert all(torch.equal(before[f"{name}.scales"], after[f"{name}.scales"]) for name in kept)


def test_plain_weights_and_floats_are_refused() -> None:
    polish = Polish()
    for kind, settings, said in [
        (
            "prune",
            {"what": "mlp", "ratio": 0.2},
            "not quantized: put it after quantize with gptq, rtn or awq, or after",
        ),
        ("quantize", {"method": "nf4"}, "which nf4 has not: quantize with gptq, rtn or awq"),
        ("quantize", {"method": "fp8"}, "which fp8 has not"),
        ("quantize", {"method": "w8a8"}, "which w8a8 has not"),
        (
            "export",
            {"format": "gguf", "type": "F16"},
            "which gguf of type F16 has not: export to gguf with a K",
        ),
        ("export", {"format": "gguf", "type": "IQ3_M"}, "which gguf of type IQ3_M has not"),
        ("export", {"format": "onnx"}, "which onnx has not"),
        ("export", {"format": "bundle", "target": "rpi5", "type": "Q4_K_M"}, "which bundle of type Q4_K_M has not"),
        ("polish", {}, "polished already"),
    ]:
        with pytest.raises(RequestError, match=said):
            polish.after(open_step(kind, settings))
    assert polish.after(open_step("quantize", {"method": "awq"})) is polish
    assert polish.after(open_step("export", {"format": "gguf", "type": "Q3_K_M"})) is polish
