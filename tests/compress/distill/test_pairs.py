import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from lighten.compress.distill.pair_step import run
from lighten.compress.distill.pair_teacher import PairTeacher, read_pairs
from lighten.compress.distill.settings import Distill
from lighten.data import pairs
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.depth import kept_layers, repeated, with_layers
from lighten.model.pair_training import IGNORED, PairSet
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.translators import tiny_translator


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_translator(tmp_path_factory.mktemp("marian"))


def test_kept_layers_are_spread() -> None:
    assert [kept_layers(6, wanted) for wanted in (1, 2, 3, 6)] == [[0], [0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]]


def test_a_model_with_fewer_layers_has_those_of_the_first(marian: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(marian)
    small = with_layers(model, 2)
    assert (small.config.encoder_layers, small.config.decoder_layers) == (2, 2)
    for side in ("encoder", "decoder"):
        ours, theirs = (getattr(each.model, side).layers for each in (small, model))
        assert len(ours) == 2
        assert torch.equal(ours[1].fc1.weight, theirs[3].fc1.weight)
    assert small.lm_head.weight is small.model.shared.weight
    with pytest.raises(RequestError, match="has 4 layers: it cannot be given 5"):
        with_layers(model, 5)


def test_layers_are_repeated_in_place(marian: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(marian)
    large = repeated(model, 8)
    for place, layer in enumerate(large.model.encoder.layers):
        assert torch.equal(layer.fc1.weight, model.model.encoder.layers[place // 2].fc1.weight)


def test_layers_of_other_families() -> None:
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, num_decoder_layers=3))
    small = with_layers(t5, 1)
    assert len(small.encoder.block) == len(small.decoder.block) == 1
    # the first layer has the positions of all others
    assert torch.equal(
        small.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
    )
    bert = BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
    )
    assert len(with_layers(bert, 2).bert.encoder.layer) == 2


def _context(folder: Path, teacher: Path, lessons: Path) -> Context:
    return Context(teacher=teacher, lessons=lessons, scratch=folder)


def _lessons(step: Distill, teacher: Path, out: Path) -> Path:
    out.mkdir()
    lessons = step.lessons()
    assert isinstance(lessons, PairTeacher)
    lessons.run(Artifact(teacher, {}), out, Context())
    return out


@pytest.mark.parametrize("how", [{}, {"alpha": 0.0}, {"beta": 1.0}, {"level": "sequence"}], ids=str)
def test_a_student_learns_at_each_level(how: dict[str, object], marian: Path, tmp_path: Path) -> None:
    settings = {"data": "phrases", "samples": 80, "length": 16, "steps": 8, "batch": 16, "lr": 3e-3, "validation": 0.1}
    step = Distill.model_validate({**settings, "student": {"layers": 2}, **how})
    lessons = _lessons(step, marian, tmp_path / "lessons")
    out = tmp_path / "student"
    out.mkdir()
    told = run(step, Artifact(marian, {}), out, _context(tmp_path, marian, lessons))
    curve = told["training"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert [each["step"] for each in told["training"]["validation"]] == [*range(1, 9)]
    found = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert found.config.decoder_layers == 2 and Checkpoint(out).facts.layers == 2
    assert (out / "tokenizer.json").read_bytes() == (marian / "tokenizer.json").read_bytes()


def test_the_teacher_writes_the_targets(marian: Path, tmp_path: Path) -> None:
    step = Distill.model_validate({"data": "phrases", "written": 10, "length": 8, "level": "sequence"})
    found = read_pairs(_lessons(step, marian, tmp_path / "lessons"))
    wanted = pairs.load("phrases", "train", 10)
    assert {pair.source for pair in found} <= {pair.source for pair in wanted}
    assert not {pair.target for pair in found} & {pair.target for pair in wanted}


def test_pairs_are_padded(marian: Path) -> None:
    config = AutoModelForSeq2SeqLM.from_pretrained(marian).config
    made = PairSet([[5, 0], [6, 7, 0]], [[8, 9, 0], [10, 0]], config.pad_token_id, config.decoder_start_token_id)
    batch = made.batch([0, 1])
    assert batch.inputs["input_ids"].tolist() == [[5, 0, 2], [6, 7, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[2, 8, 9], [2, 10, 0]]
    assert batch.labels.tolist() == [[8, 9, 0], [10, 0, IGNORED]]


def test_what_does_not_fit_the_model_is_refused(marian: Path, tmp_path: Path) -> None:
    translator = Checkpoint(marian).facts
    with pytest.raises(RequestError, match="learns from pairs of texts: data: phrases, or pairs:FILE"):
        Distill().check(translator)
    with pytest.raises(RequestError, match="lora is for causal language models"):
        Distill(data="phrases", lora=4).check(translator)
    with pytest.raises(RequestError, match="student hidden is for causal language models"):
        Distill.model_validate({"data": "phrases", "student": {"hidden": 16}}).check(translator)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="learns from a text, not pairs"):
        Distill(data="phrases").check(Checkpoint(tmp_path).facts)
