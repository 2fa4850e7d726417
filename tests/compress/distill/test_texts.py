"""Distillation of encoders, and of translation models that is interrupted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM, BertModel

from lighten.compress.distill.encoder_step import Texts, _Filler
from lighten.compress.distill.settings import Distill
from lighten.compress.distill.teacher import Lessons
from lighten.compress.distill.whole_training import distance
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.pooling import FILE
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.encoders import tiny_encoder
from tests.translators import tiny_translator

SETTINGS: dict[str, Any] = {"samples": 24, "length": 16, "steps": 12, "batch": 8, "lr": 3e-3, "validation": 0.2}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "embedding": lambda folder: tiny_encoder(folder, BertModel),
    "masked": lambda folder: tiny_encoder(folder, BertForMaskedLM),
    "seq2seq": lambda folder: tiny_translator(folder, dropout=0.1),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp(name) / "model")
            (made[name] / FILE).parent.mkdir()
            (made[name] / FILE).write_text(json.dumps({"pooling_mode_cls_token": name == "embedding"}))
        return made[name]

    return get


def distil(name: str, path: Path, folder: Path, stop_at: int | None = None, **changes: Any) -> dict[str, Any]:
    """Runs the teacher's stage and the step in a directory; stops it before a step is reported, as a kill would."""
    own = {"data": "phrases", "samples": 80} if name == "seq2seq" else {}
    step = Distill.model_validate({**SETTINGS, "student": {"layers": 2}, **own, **changes})
    facts = Checkpoint(path).facts
    assert facts.task in step.tasks
    step.check(facts)
    lessons, scratch, out = (folder / each for each in ("lessons", "scratch", "out"))
    if not lessons.exists():
        lessons.mkdir(parents=True)
        scratch.mkdir()
        made = step.lessons()
        assert made
        made.run(Artifact(path, {}), lessons, Context())
    out.mkdir(exist_ok=True)

    def report(done: int, total: int, note: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    return step.run(
        Artifact(path, {"format": "hf"}), out, Context(teacher=path, lessons=lessons, scratch=scratch, report=report)
    )


@pytest.mark.parametrize("how", [{}, {"alpha": 0.0, "beta": 1.0}, {"beta": 1.0}], ids=str)
def test_embeddings_come_nearer(how: dict[str, float], source: Callable[[str], Path], tmp_path: Path) -> None:
    path = source("embedding")
    told = distil("embedding", path, tmp_path, **how)
    training = told["training"]
    cosines = [each["cosine"] for each in training["validation"]]
    assert [each["step"] for each in training["validation"]] == [*range(1, 13)]
    assert training["curve"][-1]["loss"] < 0.9 * training["curve"][0]["loss"]
    assert max(cosines) > cosines[0]
    student, teacher = (AutoModel.from_pretrained(each).eval() for each in (tmp_path / "out", path))
    assert len(student.encoder.layer) == 2 and Checkpoint(tmp_path / "out").facts.layers == 2
    assert (tmp_path / "out" / FILE).read_bytes() == (path / FILE).read_bytes()
    texts = Texts.read(path, Lessons(tmp_path / "lessons"), 64, "cpu")
    assert texts.held == 5
    with torch.no_grad():  # what is written did best, by the first token's state as the model says
        first, other = (each(input_ids=texts.ids[-5:]).last_hidden_state[:, 0] for each in (student, teacher))
    assert torch.cosine_similarity(first, other).mean().item() == pytest.approx(max(cosines), abs=1e-5)


def test_gaps_are_filled_as_the_teacher_does(source: Callable[[str], Path], tmp_path: Path) -> None:
    told = distil("masked", source("masked"), tmp_path, beta=0.5)
    curve, checks = told["training"]["curve"], told["training"]["validation"]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert min(each["perplexity"] for each in checks) < checks[0]["perplexity"]
    assert len(AutoModelForMaskedLM.from_pretrained(tmp_path / "out").bert.encoder.layer) == 2


@pytest.mark.parametrize("name", MAKERS)
def test_an_interrupted_training_ends_in_the_same_weights(
    name: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {"save_every": 4, "validate_every": 2, "beta": 0.5}
    whole = distil(name, source(name), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        distil(name, source(name), tmp_path / "broken", stop_at=7, **settings)
    assert [each.name for each in (tmp_path / "broken/scratch").glob("checkpoint*")] == ["checkpoint-00000004"]
    torch.manual_seed(99)  # another process has other numbers
    again = distil(name, source(name), tmp_path / "broken", **settings)
    assert again == whole
    files = [tmp_path / each / "out/model.safetensors" for each in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "broken/scratch/checkpoint-00000004").exists()
    assert len(load_file(files[0])) > 10


def test_the_masked_tokens_are_neither_first_nor_last(source: Callable[[str], Path]) -> None:
    trainer: Any = _Filler.__new__(_Filler)
    trainer.step, trainer.texts = Distill(seed=1), Texts(torch.zeros(0), 0, 9)
    ids = torch.arange(10, 10 + 3 * 22).view(3, 22)
    read, places = trainer._hide(ids, 5)
    assert places.sum(1).tolist() == [3, 3, 3]
    assert not places[:, [0, -1]].any()
    assert (read[places] == 9).all() and torch.equal(read[~places], ids[~places])
    assert torch.equal(places, trainer._hide(ids, 5)[1]) and not torch.equal(places, trainer._hide(ids, 6)[1])


def test_layers_are_compared_with_those_as_far_along() -> None:
    chance = torch.Generator().manual_seed(0)
    teacher = tuple(torch.randn(2, 3, 4, generator=chance) for _ in range(5))
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert [float(each) for each in distance((teacher[0], teacher[2], teacher[4]), teacher, mask)] == [0.0, 0.0]
    far = distance((teacher[0], 2 * teacher[2], teacher[4]), teacher, mask)
    assert [float(each) for each in far] == [pytest.approx(1.0), 0.0]
    with pytest.raises(RequestError, match="states are 2 wide and the teacher's 4"):
        distance((teacher[0][..., :2],), teacher, mask)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("embedding", {"data": "phrases"}, "learns from a text, not pairs"),
        ("embedding", {"alpha": 0.0}, "nothing to learn from the teacher"),
        ("masked", {"level": "sequence"}, "level is for causal language models"),
        ("masked", {"lora": 4}, "lora is for causal language models"),
        ("masked", {"student": {"hidden": 32}}, "student hidden is for causal language models"),
    ],
)
def test_what_does_not_fit_an_encoder_is_refused(
    name: str, changes: dict[str, Any], why: str, source: Callable[[str], Path]
) -> None:
    with pytest.raises(RequestError, match=why):
        Distill.model_validate(changes).check(Checkpoint(source(name)).facts)


def test_teacher_and_student_are_of_one_kind(source: Callable[[str], Path], tmp_path: Path) -> None:
    context = Context(teacher=source("masked"), lessons=tmp_path, scratch=tmp_path)
    with pytest.raises(
        RequestError, match="the student is an encoder that gives embeddings and its teacher an encoder"
    ):
        Distill().run(Artifact(source("embedding"), {"format": "hf"}), tmp_path, context)
