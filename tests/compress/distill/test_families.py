"""Teachers and students of any causal family: soft caps, sinks, experts, other names, and layers of two kinds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.compress.distill.ends import behind_of, head_of, run_body
from lighten.compress.distill.settings import Distill
from lighten.compress.distill.teacher import Lessons
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

QUICK = {
    "length": 32,
    "samples": 16,
    "batch": 4,
    "steps": 24,
    "lr": 1e-3,
    "alpha": 1.0,
    "precision": "fp32",
    "validation": 0,
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma2", "gemma2", {"top_k": 0}),
    ("qwen3_moe", "qwen3", {"beta": 0.1}),
    ("granite", "granite", {"top_k": 20, "quantize": {"bits": 4, "group_size": 32}}),
    ("qwen3_moe", "qwen3_moe", {"top_k": 20}),
    ("lfm2", "lfm2", {"top_k": 20, "student": {"layers": 2}}),
    ("gpt_neox", "gpt_neox", {"top_k": 20, "lora": 4}),
]


def made(family: str, folder: Path) -> Path:
    """Writes a small model. Granite gets a scale of its logits that changes them."""
    make(family, folder)
    config = json.loads((folder / "config.json").read_text())
    if "logits_scaling" in config:
        (folder / "config.json").write_text(json.dumps({**config, "logits_scaling": 0.5}))
    return folder


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids, use_cache=False).logits
    return found


def divergence(folder: Path, teacher: Path, ids: torch.Tensor) -> float:
    ours, theirs = (torch.log_softmax(logits(each, ids), -1) for each in (folder, teacher))
    return float(torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) / ids.shape[1])


@pytest.mark.parametrize(("teaches", "learns", "settings"), CASES)
def test_a_student_comes_nearer_to_its_teacher(
    teaches: str, learns: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("teacher", "given", "lessons", "scratch", "out"):
        (tmp_path / name).mkdir()
    teacher = made(teaches, tmp_path / "teacher")
    given = made(learns, tmp_path / "given")
    model = AutoModelForCausalLM.from_pretrained(given)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(given)
    step = Distill.model_validate({**QUICK, **settings})
    step.lessons().run(Artifact(teacher, {}), tmp_path / "lessons", Context())
    context = Context(teacher=teacher, lessons=tmp_path / "lessons", scratch=tmp_path / "scratch")
    facts = step.run(Artifact(given, {"format": "hf"}), tmp_path / "out", context)
    ids = Lessons(tmp_path / "lessons").ids[:8]
    after = divergence(tmp_path / "out", teacher, ids)
    if "student" in settings:
        layers = {name.split(".")[2] for name in Checkpoint(tmp_path / "out").weight_map if ".layers." in name}
        assert layers == {"0", "1"} and facts["params"] < sum(each.numel() for each in model.parameters())
    else:
        assert Checkpoint(tmp_path / "out").shapes() == Checkpoint(given).shapes()
        assert after < divergence(given, teacher, ids)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2", "qwen3", "opt", "phi3"])
def test_the_code_behind_the_head_is_the_models_own(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made(family, tmp_path), dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        raw = head_of(model)(run_body(model, ids).last_hidden_state[0])
        behind = behind_of(model)
        assert (behind is None) == (family in ("qwen3", "opt", "phi3"))
        found = behind(raw) if behind else raw
        assert torch.allclose(found, model(ids, use_cache=False).logits[0], atol=1e-5)


def test_a_teacher_of_another_family_writes_sequences(tmp_path: Path) -> None:
    step = Distill.model_validate({**QUICK, "level": "sequence", "written": 4})
    (tmp_path / "out").mkdir()
    (tmp_path / "model").mkdir()
    source = Artifact(make("gemma3_text", tmp_path / "model"), {})
    facts = step.lessons().run(source, tmp_path / "out", Context())
    assert facts["sequences"] == facts["of_the_text"] + 4
    assert Lessons(tmp_path / "out").ids.shape == (facts["sequences"], facts["length"])
