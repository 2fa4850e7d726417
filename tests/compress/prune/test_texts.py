"""Structured pruning of encoders and sequence-to-sequence models: transformers' own class opens what is left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DistilBertConfig, DistilBertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.prune.choice import Choices
from lighten.compress.prune.settings import Prune
from lighten.errors import RequestError
from lighten.model import stream
from lighten.model.blockwise import known_anatomy
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import blocks_of
from lighten.pipeline.steps import step_class
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.test_texts import MODELS, _saved

Swept = Callable[[str], tuple[Artifact, Path]]
WIDE = {"vocab_size": 1010, "max_position_embeddings": 80}
MAKERS: dict[str, Callable[[Path], Path]] = {
    **MODELS,
    "roberta": lambda folder: _saved(
        folder,
        RobertaForMaskedLM,
        RobertaConfig(
            **WIDE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, pad_token_id=1
        ),
    ),
    "distilbert": lambda folder: _saved(
        folder, DistilBertForMaskedLM, DistilBertConfig(**WIDE, dim=64, n_layers=2, n_heads=4, hidden_dim=96)
    ),
}
MLP: dict[str, Any] = {"what": "mlp", "ratio": 0.3, "multiple": 8, "repair": False}
LAYERS: dict[str, Any] = {"what": "layers", "count": 1}
HEADS: dict[str, Any] = {"what": "heads", "count": 1}
ENCODERS = ("bert", "roberta", "distilbert")
CASES = [(each, MLP) for each in (*ENCODERS, "marian", "t5", "bart")] + [(each, LAYERS) for each in ENCODERS]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    made: dict[str, tuple[Artifact, Path]] = {}

    def get(name: str) -> tuple[Artifact, Path]:
        if name not in made:
            path, grams = MAKERS[name](tmp_path_factory.mktemp(name) / "model"), tmp_path_factory.mktemp("grams")
            source = Artifact(path, {"key": "x", "format": "hf"})
            Sweep(samples=3, length=32, data="phrases" if name == "marian" else "builtin").run(source, grams, Context())
            made[name] = source, grams
        return made[name]

    return get


def _opened(path: Path) -> Any:
    kind = getattr(transformers, Checkpoint(path).facts.architecture)
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


@torch.no_grad()
def _states(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45)[None]
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model(input_ids=ids, **decoder)[0]
    return found


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}-{each['what']}" for name, each in CASES])
def test_what_is_left_is_the_model_with_a_mask(
    name: str, settings: dict[str, Any], swept: Swept, tmp_path: Path
) -> None:
    source, grams = swept(name)
    step, checkpoint, context = Prune.model_validate(settings), Checkpoint(source.path), Context(grams=grams)
    assert checkpoint.facts.task in step.tasks
    step.check(checkpoint.facts)
    facts = step.run(source, tmp_path, context)
    small, plain = _opened(tmp_path), _opened(source.path)
    assert small.num_parameters() < plain.num_parameters()
    assert facts["left"]["intermediate"] == (64 if settings is MLP else 96)
    choices = Choices(step, checkpoint, context)
    cut = choices.cut(**{str(step.what): step.amount(checkpoint.facts)})
    layers = known_anatomy(checkpoint, grams).layers
    for index, block in enumerate(blocks_of(plain).values()):
        if index in cut.layers:
            block.forward = lambda states, *_, **__: states  # type: ignore[method-assign]
        for channels, gone in choices.parts.cuts(cut, index):
            assert len(gone) == 32
            (linear,) = (each for each in layers[index].linears if each.name == channels.reader)
            plain.get_submodule(f"{layers[index].module}.{linear.module}").weight.data[:, list(gone)] = 0
    assert len(cut.channels) == len(layers) or len(cut.layers) == 1
    wanted = _states(plain)
    assert (_states(small) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_repair_brings_an_encoder_nearer(swept: Swept, tmp_path: Path) -> None:
    source, grams = swept("bert")
    whole, errors = _states(_opened(source.path)), {}
    for repair in (True, False):
        (out := tmp_path / str(repair)).mkdir()
        Prune.model_validate({**MLP, "repair": repair}).run(source, out, Context(grams=grams))
        errors[repair] = float((_states(_opened(out)) - whole).square().mean())
    assert errors[True] < errors[False]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", r"BertModel gives it fewer heads.*divides one width among all heads"),
        ("marian", r"MarianMTModel gives it fewer heads.*divides one width among all heads"),
        ("t5", r"T5ForConditionalGeneration gives it fewer heads.*relative_attention_bias.weight would change too"),
    ],
)
def test_heads_that_cannot_go_are_refused_with_the_reason(name: str, why: str, swept: Swept, tmp_path: Path) -> None:
    source, grams = swept(name)
    with pytest.raises(RequestError, match=why):
        Prune.model_validate(HEADS).run(source, tmp_path, Context(grams=grams))


def test_layers_of_two_stacks_are_refused(swept: Swept) -> None:
    step = step_class("prune", LAYERS).model_validate(LAYERS)
    with pytest.raises(RequestError, match="encoder and decoder count theirs apart: distil"):
        step.check(Checkpoint(swept("bart")[0].path).facts)
