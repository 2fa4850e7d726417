"""Distillation of small models: what is learned, what survives an interruption, what is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lighten.compress.distill import losses
from lighten.compress.distill.settings import Distill
from lighten.compress.distill.student import Student
from lighten.compress.distill.teacher import Lessons, Teacher, batches, last_states
from lighten.compress.prune.settings import Prune
from lighten.compress.quantize.grid import nearest, rtn
from lighten.errors import Failure, RequestError
from lighten.facts import ModelFacts
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QUICK = {"length": 32, "samples": 24, "batch": 4, "steps": 6, "lr": 1e-3, "top_k": 20, "precision": "fp32"}


@pytest.fixture(scope="module")
def teacher(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with noise on its weights."""
    folder = Path(shutil.copytree(teacher, tmp_path_factory.mktemp("student") / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.float().std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def distill(
    given: Path, teacher: Path, folder: Path, stop_at: int | None = None, rows: int | None = None, **settings: Any
) -> tuple[dict[str, Any], Path]:
    """Runs the stages as the pipeline does; `stop_at` raises in the middle of training."""
    step = Distill.model_validate({**QUICK, **settings})
    lessons, scratch, out = folder / "lessons", folder / "scratch", folder / "out"
    step.check(Checkpoint(given).facts)
    if not lessons.exists():
        lessons.mkdir(parents=True)
        step.lessons().model_copy(update={"rows": rows}).run(Artifact(teacher, {}), lessons, Context())
    scratch.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    def report(done: int, total: int, note: str) -> None:
        if stop_at is not None and done >= stop_at:
            raise KeyboardInterrupt

    context = Context(report, teacher=teacher, lessons=lessons, scratch=scratch)
    facts = step.run(Artifact(given, {"format": "hf"}), out, context)
    json.dumps(facts, allow_nan=False)
    return facts, out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.weight_map}


def divergence(student: Path, teacher: Path, ids: torch.Tensor) -> float:
    said = []
    for folder in (student, teacher):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            said.append(torch.log_softmax(model(ids).logits, -1))
    return float(losses.divergence(said[0], said[1]).mean())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 0},
        {"temperature": 2.0, "alpha": 1.0},
        {"beta": 1.0},
        {"lora": 4},
        {"level": "sequence", "written": 160},
        {"gradient_checkpointing": True, "accumulate": 2},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"quantize": {"bits": 4, "group_size": 32}},
        {"written": 8},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_student_comes_nearer_to_its_teacher(
    student: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    # the last weights, for text is as strange to this teacher as to its student
    facts, out = distill(student, teacher, tmp_path, **{**settings, "steps": 30, "validation": 0})
    ids = Lessons(tmp_path / "lessons").ids[-8:]
    before = student
    if grid := settings.get("quantize"):  # what it is compared with has coarse weights too
        before = Path(shutil.copytree(student, tmp_path / "before"))
        model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.bfloat16)
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = nearest(module.weight.data, grid["bits"], grid["group_size"], True).bfloat16()
        model.save_pretrained(before)
    assert divergence(out, teacher, ids) < divergence(before, teacher, ids)
    assert facts["training"]["validation"] == [] and facts["validation_perplexity"] is None
    assert facts["steps"] == 30 and len(facts["training"]["curve"]) == 30
    assert facts["params"] == Checkpoint(out).facts.params
    taught = settings.get("level") != "sequence"
    assert all(("kl" in point) == taught for point in facts["training"]["curve"])


def test_the_weights_that_did_best_on_what_was_held_out_are_kept(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Plain text, and a rate so large that it gets worse in the end."""
    settings = {"alpha": 0.0, "lr": 0.03, "clip": 100.0, "steps": 40, "validate_every": 4, "warmup": 0.5}
    facts, out = distill(student, teacher, tmp_path, **settings)
    looks = {each["step"]: each["perplexity"] for each in facts["training"]["validation"]}
    best = min(looks, key=lambda step: looks[step])
    assert 0 < best < 40 and facts["validation_perplexity"] == pytest.approx(looks[best], rel=1e-5)
    ids = Lessons(tmp_path / "lessons").ids[-1:]  # one of 24 sequences
    with torch.inference_mode():
        said = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits[0, :-1]
    assert float(torch.nn.functional.cross_entropy(said, ids[0, 1:]).exp()) == pytest.approx(looks[best], rel=0.01)


def test_gradient_checkpointing_and_accumulation_change_memory_not_weights(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    found = [
        weights(distill(student, teacher, tmp_path / str(number), **settings)[1])
        for number, settings in enumerate([{}, {"gradient_checkpointing": True}, {"accumulate": 4}])
    ]
    for other in found[1:]:
        for name, weight in found[0].items():
            assert torch.allclose(weight.float(), other[name].float(), rtol=0.02, atol=2e-3), name


@pytest.mark.parametrize(("file", "content"), [("state.json", "{}"), ("state.safetensors", "")])
def test_a_damaged_checkpoint_is_dropped_and_said(
    student: Path, teacher: Path, tmp_path: Path, file: str, content: str
) -> None:
    settings = {"save_every": 2, "validate_every": 2}
    _, out = distill(student, teacher, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, tmp_path / "broken", stop_at=3, **settings)
    (tmp_path / "broken/scratch/checkpoint-00000002" / file).write_text(content)
    _, again = distill(student, teacher, tmp_path / "broken", **settings)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings", [{}, {"lora": 4}, {"beta": 0.5}, {"movement": {"sparsity": 0.5}}, {"precision": "fp16"}]
)
@pytest.mark.parametrize("stop_at", [3, 5])
def test_an_interrupted_training_ends_in_the_same_weights(
    student: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any], stop_at: int
) -> None:
    settings = {**settings, "save_every": 2, "validate_every": 2}
    whole, out = distill(student, teacher, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, tmp_path / "broken", stop_at=stop_at, **settings)
    left = sorted((tmp_path / "broken/scratch").glob("checkpoint-*"))
    assert [path.name for path in left] == [f"checkpoint-{2 * (stop_at // 2):08d}"]
    resumed, again = distill(student, teacher, tmp_path / "broken", **settings)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert resumed == whole  # the curve too


def test_a_training_is_taken_up_again_where_there_are_no_hard_links(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    settings = {"save_every": 2, "validate_every": 2}
    _, out = distill(student, teacher, tmp_path / "whole", **settings)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, tmp_path / "broken", stop_at=5, **settings)
    assert (tmp_path / "broken/scratch/checkpoint-00000004/best.safetensors").stat().st_nlink == 1
    _, again = distill(student, teacher, tmp_path / "broken", **settings)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_the_lessons_are_the_teachers_distributions(teacher: Path, tmp_path: Path) -> None:
    step = Distill.model_validate({**QUICK, "temperature": 2.0}).lessons()
    step.run(Artifact(teacher, {}), tmp_path, Context())
    lessons = Lessons(tmp_path)
    assert len(lessons) == 24 and lessons.facts["of_the_text"] == 24
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        said = model.lm_head(last_states(model, lessons.ids[5][None]))[0, :-1].float()
    expected = losses.top(said, 20, 2.0)
    found = lessons.targets(5)
    assert found is not None
    assert torch.allclose(found.log_probs, expected.log_probs, atol=0.06)
    assert torch.allclose(found.rest, expected.rest, atol=0.06)


def test_the_teacher_writes_as_it_would_speak(teacher: Path, tmp_path: Path) -> None:
    """The same seed writes the same; what it writes is likely by its own measure."""
    made = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        step = Distill.model_validate({**QUICK, "level": "sequence", "written": 6, "seed": seed}).lessons()
        step.run(Artifact(teacher, {}), folder, Context())
        lessons = Lessons(folder)
        assert len(lessons) == 30 and lessons.facts["of_the_text"] == 24
        made.append(lessons.ids[24:])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.inference_mode():
        said = torch.log_softmax(model(made[0]).logits[:, 15:-1], -1)
    own = said.gather(-1, made[0][:, 16:, None]).mean()
    strange = said.gather(-1, torch.randint(0, said.shape[-1], made[0][:, 16:, None].shape)).mean()
    entropy = -(said.exp() * said).sum(-1).mean()
    assert own > strange and float(own) == pytest.approx(-float(entropy), rel=0.25)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_training_goes_through_the_grid_of_the_quantizer(bits: int, sym: bool) -> None:
    weight = torch.randn(24, 128)
    assert torch.equal(nearest(weight, bits, 32, sym), rtn(weight, bits, 32, sym).weight())
    assert torch.equal(nearest(weight, bits, -1, sym), rtn(weight, bits, -1, sym).weight())


def test_a_following_quantizer_finds_the_weights_on_its_grid(student: Path, teacher: Path, tmp_path: Path) -> None:
    _, out = distill(student, teacher, tmp_path, quantize={"bits": 3, "group_size": 32})
    for name, weight in weights(out).items():
        if name.endswith("_proj.weight"):
            again = rtn(weight, 3, 32, True).weight()
            assert torch.allclose(again, weight.float(), rtol=0.01, atol=1e-6), name


def test_zeros_of_a_pruned_student_stay(student: Path, teacher: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    Prune.model_validate({"method": "magnitude", "pattern": "2:4"}).run(
        Artifact(student, {"format": "hf"}), pruned, Context()
    )
    facts, out = distill(pruned, teacher, tmp_path / "run")
    before, after = weights(pruned), weights(out)
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(weight == 0, after[name] == 0), name
            assert not torch.equal(weight, after[name])
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(RequestError, match="zeros that are to stay; lora would fill them"):
        distill(pruned, teacher, tmp_path / "lora", lora=4)


@pytest.mark.parametrize("asked", [{"sparsity": 0.6}, {"pattern": "1:4"}])
def test_movement_pruning_reaches_what_was_asked(
    student: Path, teacher: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    facts, out = distill(student, teacher, tmp_path, movement=asked, steps=12, validate_every=3)
    wanted = asked.get("sparsity", 0.75)
    assert facts["sparsity"] == pytest.approx(wanted, abs=0.01)
    for name, weight in weights(out).items():
        if name.endswith("_proj.weight"):
            assert float((weight == 0).float().mean()) == pytest.approx(wanted, abs=0.01), name


def test_movement_is_the_sum_of_minus_weight_times_gradient(student: Path, teacher: Path) -> None:
    step = Distill.model_validate({**QUICK, "movement": {"sparsity": 0.5}})
    found = Student(step, student, Context())
    expected = {}
    for name, module in found.linears.items():
        module.weight.grad = torch.randn_like(module.weight)
        expected[name] = -module.weight.detach() * module.weight.grad
    found.move(0.5)
    first = {name: kept.clone() for name, kept in found.kept.items()}
    found.move(0.5)
    for name, module in found.linears.items():
        assert torch.allclose(found.scores[name], 2 * expected[name], atol=1e-6), name
        best = expected[name].flatten().topk(module.weight.numel() // 2).indices
        assert set(first[name].flatten().nonzero().flatten().tolist()) == set(best.tolist())
        # a weight that was masked when the gradient was taken gets none itself
        assert torch.equal(module.weight.grad == 0, ~first[name]), name


def test_a_student_made_anew_has_the_shape_that_was_asked_for(teacher: Path, tmp_path: Path) -> None:
    shape = {"layers": 2, "hidden": 32, "intermediate": 48, "heads": 2, "kv_heads": 1}
    facts, out = distill(teacher, teacher, tmp_path, student=shape, steps=20, lr=3e-3)
    found = Checkpoint(out).facts
    assert (found.layers, found.hidden, found.intermediate, found.heads, found.kv_heads) == (2, 32, 48, 2, 1)
    assert found.head_dim == 16 and facts["params"] == found.params
    assert AutoModelForCausalLM.from_pretrained(out)(torch.arange(8)[None]).logits.isfinite().all()
    curve = facts["training"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_hidden_states_of_another_width_are_projected(teacher: Path, tmp_path: Path) -> None:
    shape = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1}
    facts, _ = distill(teacher, teacher, tmp_path, student=shape, beta=1.0, save_every=2)
    assert facts["steps"] == 6


def test_a_loss_that_is_no_number_stops_and_names_the_step(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = losses.head_loss, []

    def breaks(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        gradient, sums = plain(*arguments, **named)
        if len(calls) == 5:
            sums.ce = float("nan")
        return gradient, sums

    monkeypatch.setattr(losses, "head_loss", breaks)
    with pytest.raises(Failure, match=r"the loss is nan at step 5.*last good checkpoint is of step 4, in .*Lower lr"):
        distill(student, teacher, tmp_path, save_every=2)
    assert (tmp_path / "scratch/checkpoint-00000004/state.safetensors").is_file()


def test_other_vocabularies_are_refused(
    student: Path, teacher: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny("llama", "spm", dtype=torch.bfloat16, **SHAPE)
    with pytest.raises(RequestError, match="student and teacher have different vocabularies"):
        distill(student, other, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 4, "batch": 8}, "fewer than a batch of 8"),
        ({"level": "sequence", "written": 3}, "fewer than a batch of 4"),
        ({"length": 10**6}, "shorter than one sample"),
    ],
)
def test_a_text_that_is_too_short_is_refused(
    student: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        distill(student, teacher, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 6, "accumulate": 4}, "cannot be cut into 4 equal parts"),
        ({"lora": 4, "quantize": {"bits": 4}}, "lora leaves the weights alone"),
        ({"movement": {}}, "movement needs one of the two"),
        ({"movement": {"pattern": "4:2"}}, "a pattern is N:M"),
        ({"quantize": "bits=5"}, "Input should be"),
        ({"student": {"layer": 3}}, "layer"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Distill.model_validate(settings)


def test_settings_are_read_from_text() -> None:
    step = Distill.model_validate(
        {"quantize": "bits=3,group_size=64", "student": "layers=2,hidden=64", "movement": "pattern=2:4"}
    )
    assert step.quantize and (step.quantize.bits, step.quantize.group_size) == (3, 64)
    facts = ModelFacts("LlamaForCausalLM", 4, 128, 256, 4, 2, 32, 1000, False)
    assert step.changes(facts) == {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
    assert step.movement and step.movement.pattern == "2:4"


def test_every_epoch_has_an_order_of_its_own_and_leaves_nothing_out() -> None:
    stream = batches(10, 5, seed=3)
    epochs = [[*next(stream), *next(stream)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = batches(10, 5, seed=3)
    assert [*next(again), *next(again)] == epochs[0]


def padded(folder: Path, out: Path, rows: int) -> Path:
    """Returns a copy with more rows of embedding and head, whose tokens are the likeliest by far."""
    copy = Path(shutil.copytree(folder, out))
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16)
    before = model.config.vocab_size
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[before:] = 3 * model.lm_head.weight[: rows - before]
    model.save_pretrained(copy)
    return copy


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}])
def test_rows_that_pad_a_teacher_or_a_student_change_nothing(
    teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = Checkpoint(teacher).facts.vocab
    larger = padded(teacher, tmp_path / "larger", rows + 30)
    step = Teacher(length=32, samples=3, top_k=5, rows=rows)
    found = []
    for number, model in enumerate((teacher, larger)):
        out = tmp_path / f"lessons{number}"
        out.mkdir()
        step.run(Artifact(model, {}), out, Context())
        found.append(Lessons(out).targets(0))
    assert found[0] and found[1]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.allclose(found[0].log_probs, found[1].log_probs, atol=1e-2)
    for given, taught, name in ((teacher, larger, "a"), (larger, teacher, "b")):
        facts, _ = distill(given, taught, tmp_path / name, rows=min(rows, Checkpoint(given).facts.vocab), **settings)
        assert facts["steps"] == 6
        assert all(point["kl"] < 20 for point in facts["training"]["curve"] if point["kl"] is not None)
