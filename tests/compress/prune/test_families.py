"""Structured pruning of models whose parts are found by trying: transformers' own class opens what is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.prune.amounts import Target
from lighten.compress.prune.choice import Choices, mean_loss
from lighten.compress.prune.settings import Prune
from lighten.compress.prune.thin import Thinned
from lighten.compress.prune.ways import Sizes
from lighten.errors import RequestError
from lighten.model import stream
from lighten.model.blockwise import known_anatomy
from lighten.model.checkpoint import Checkpoint
from lighten.model.discovery import blocks_of
from lighten.model.grams import read_ids
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make

Swept = Callable[[str], tuple[Artifact, Path]]
MLP = ("phi3", "lfm2", "granitemoehybrid", "deepseek_v3", "llama4_text", "gemma4_text", "gemma3n_text")
"""Fused gate and up, other names, a shared MLP beside experts, dense layers before or between layers of experts, states
that layers share, a width for each layer."""
HEADS = ("qwen3_5_text", "phi3", "deepseek_v3")
"""Gated queries in layers of two kinds, fused projections, latent attention."""
LAYERS = ("granitemoehybrid", "llama4_text", "deepseek_v3")
CASES = [("mlp", each) for each in MLP] + [("heads", each) for each in HEADS] + [("layers", each) for each in LAYERS]
SETTINGS: dict[str, dict[str, Any]] = {
    "mlp": {"what": "mlp", "ratio": 0.3, "multiple": 8, "repair": False},
    "heads": {"what": "heads", "count": 1, "repair": False},
    "layers": {"what": "layers", "count": 1},
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Returns a function that gives a model of a family and the directory of its sweep."""
    made: dict[str, tuple[Artifact, Path]] = {}

    def get(family: str) -> tuple[Artifact, Path]:
        if family not in made:
            source = Artifact(make(family, tmp_path_factory.mktemp(family)), {"key": "x", "format": "hf"})
            grams = tmp_path_factory.mktemp(f"{family}-grams")
            Sweep(samples=3, length=32).run(source, grams, Context())
            made[family] = source, grams
        return made[family]

    return get


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        given = torch.arange(5, 45)[None] if ids is None else ids
        found: torch.Tensor = model.eval()(given, use_cache=False).logits
    return found


@pytest.mark.parametrize(("what", "family"), CASES)
def test_what_is_left_is_the_model_with_a_mask(what: str, family: str, swept: Swept, tmp_path: Path) -> None:
    source, grams = swept(family)
    step, checkpoint, context = Prune.model_validate(SETTINGS[what]), Checkpoint(source.path), Context(grams=grams)
    facts = step.run(source, tmp_path, context)
    json.dumps(facts, allow_nan=False)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert facts["params"] == sum(each.numel() for each in {id(e): e for e in small.parameters()}.values()) or (
        facts["params"] == sum(Checkpoint(tmp_path).tensor(name).numel() for name in Checkpoint(tmp_path).weight_map)
    )

    choices = Choices(step, checkpoint, context)
    cut = choices.cut(**{what: step.amount(checkpoint.facts)})
    plain = AutoModelForCausalLM.from_pretrained(source.path, **options)
    layers = known_anatomy(checkpoint, grams).layers
    for index, block in enumerate(blocks_of(plain).values()):
        if index in cut.layers:
            block.forward = lambda states, *_, **__: states  # type: ignore[method-assign]
        for channels, gone in choices.parts.cuts(cut, index):
            (linear,) = (each for each in layers[index].linears if each.name == channels.reader)
            weight = plain.get_submodule(f"{layers[index].module}.{linear.module}").weight
            for group in gone:
                weight.data[:, group * channels.size : (group + 1) * channels.size] = 0
    assert cut.channels or cut.groups or cut.layers
    wanted = logits(plain)
    assert (logits(small) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_repaired_model_is_nearer_to_the_whole(swept: Swept, tmp_path: Path) -> None:
    """And its loss, read without being written, is that of the written one."""
    source, grams = swept("phi3")
    ids = read_ids(grams)
    whole = logits(AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32), ids)
    errors = {}
    for repair in (True, False):
        (out := tmp_path / str(repair)).mkdir()
        settings = {**SETTINGS["mlp"], "repair": repair, "ratio": 0.5}
        step = Prune.model_validate(settings)
        step.run(source, out, Context(grams=grams))
        left = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), ids)
        errors[repair] = float((left - whole).square().mean())
        choices = Choices(step, Checkpoint(source.path), Context(grams=grams))
        cut = choices.cut(mlp=step.amount(choices.facts))
        thin = Thinned(
            Checkpoint(source.path), cut, grams if repair else None, step.damp_percent or 0.0, "cpu", choices.parts
        )
        assert thin.shapes() == Checkpoint(out).shapes()
        assert mean_loss(thin, ids, Context()) == pytest.approx(mean_loss(Checkpoint(out), ids, Context()), abs=1e-5)
    assert errors[True] < errors[False]


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("mamba2", SETTINGS["mlp"], r"no channels of MLPs can go from Mamba2.*mixer\.norm\.weight has the same"),
        ("qwen3_moe", SETTINGS["mlp"], "experts are no such linears"),
        ("gpt_oss", SETTINGS["heads"], "no heads can go from GptOss.*sinks"),
        ("gemma3n_text", SETTINGS["layers"], r"layer \d of Gemma3n.* would be another as layer"),
        ("gemma3n_text", SETTINGS["heads"], "no setting of Gemma3nForCausalLM gives it fewer heads"),
    ],
)
def test_what_cannot_go_is_refused_with_the_reason(
    family: str, settings: dict[str, Any], why: str, swept: Swept, tmp_path: Path
) -> None:
    source, grams = swept(family)
    with pytest.raises(RequestError, match=why):
        Prune.model_validate(settings).run(source, tmp_path, Context(grams=grams))


def test_layers_that_keep_their_mlp_are_named(swept: Swept, tmp_path: Path) -> None:
    source, grams = swept("llama4_text")
    context = Context(grams=grams)
    facts = Prune.model_validate(SETTINGS["mlp"]).run(source, tmp_path, context)
    assert [each["what"].rpartition(".layers.")[2] for each in facts["kept"]] == [
        "1.feed_forward.shared_expert.down_proj",
        "3.feed_forward.shared_expert.down_proj",
    ]
    assert any("2 layers keep their MLP as it is" in warning for warning in context.warnings)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma3_text", "qwen3_moe"])
def test_a_target_counts_the_weights_that_are_left(family: str, swept: Swept, tmp_path: Path) -> None:
    """Dense layers among layers of experts, sliding and full attention, experts without channels that can go."""
    source, grams = swept(family)
    whole = sum(each.numel() for each in AutoModelForCausalLM.from_pretrained(source.path).parameters())
    most = int(0.85 * whole)
    step = Prune.model_validate({"target": {"params": most}})
    facts = step.run(source, tmp_path, Context(grams=grams))
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    left = sum(each.numel() for each in small.parameters())
    assert left <= most
    chosen = facts["target"]["chosen"]
    assert any(chosen.values())
    choices = Choices(step, Checkpoint(source.path), Context(grams=grams))
    steps = {way: each.counts for way, each in choices.allowed.items()}
    sizes = Sizes(choices.parts, steps, choices.counts, choices.gone_layers)
    assert sizes.params(*chosen.values()) == facts["params"]
    reachable = {way: each.counts[-1] for way, each in choices.allowed.items()}
    smallest = choices.parts.params(choices.cut(**reachable))
    assert sizes.params(*reachable.values()) == smallest
    with pytest.raises(RequestError, match=f"leaves {smallest:,}"):
        Choices(step, Checkpoint(source.path), Context(grams=grams)).reach(Target(params=smallest - 1))


def test_a_target_says_which_parts_cannot_go(swept: Swept, tmp_path: Path) -> None:
    source, grams = swept("gemma4_text")
    step = Prune.model_validate({"target": "ratio=0.3"})
    with pytest.raises(RequestError, match=r"cannot be reached.*layers: Gemma4ForCausalLM cannot have \d layers"):
        step.run(source, tmp_path, Context(grams=grams))
