"""The prune step on small models: what transformers and llama.cpp open, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import STATES, Sweep
from lighten.compress.prune.choice import mean_loss
from lighten.compress.prune.parts import Cut
from lighten.compress.prune.settings import Prune
from lighten.compress.prune.thin import Thinned
from lighten.errors import RequestError
from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime
from lighten.export.gguf.write import write
from lighten.model.checkpoint import Checkpoint
from lighten.model.formats import FORMATS
from lighten.model.gguf_source import inspect
from lighten.model.grams import read_ids, read_index
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FAMILIES = ("llama", "llama-bias", "llama-tied", "qwen2")


@pytest.fixture(scope="module")
def swept(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Artifact, Path]]:
    """Returns a function that gives a model of a family and the directory of its sweep."""
    made: dict[str, tuple[Artifact, Path]] = {}

    def get(family: str) -> tuple[Artifact, Path]:
        if family not in made:
            source = Artifact(tiny(family, dtype=torch.bfloat16, **SHAPE), {"key": "x", "format": "hf"})
            grams = tmp_path_factory.mktemp(f"{family}-grams")
            Sweep(samples=16, length=64).run(source, grams, Context())
            made[family] = source, grams
        return made[family]

    return get


@pytest.fixture(scope="module")
def sensitivity(swept: Callable[[str], tuple[Artifact, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    Sensitivities(samples=16, length=64).run(swept("llama")[0], folder, Context())
    return folder


def prune(
    swept: tuple[Artifact, Path], out: Path, sensitivity: Path | None = None, **settings: Any
) -> tuple[dict[str, Any], Context]:
    out.mkdir()
    context = Context(grams=swept[1], sensitivity=sensitivity)
    facts = Prune.model_validate(settings).run(swept[0], out, context)
    json.dumps(facts, allow_nan=False)  # as the manifest is written
    return facts, context


def logits(folder: Path, ids: torch.Tensor, edit: Callable[[Any], None] | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        if edit:
            edit(model)
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_go_are_as_if_they_were_silent(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, family: str
) -> None:
    """Without repair: key/value heads and the query heads that read them, against the whole model with a mask."""
    source, grams = swept(family)
    facts, _ = prune(swept(family), tmp_path / "out", what="heads", count=2, repair=False)
    gone = {int(layer): groups for layer, groups in facts["removed"]["kv_heads"].items()}
    size = Checkpoint(source.path).facts.head_dim

    def silence(model: Any) -> None:
        for index, layer in enumerate(model.model.layers):
            for group in gone[index]:  # two query heads read each of the four
                layer.self_attn.o_proj.weight[:, group * 2 * size : (group + 1) * 2 * size] = 0

    ids = read_ids(grams)[:2]
    assert torch.allclose(logits(tmp_path / "out", ids), logits(source.path, ids, silence), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_go_are_as_if_they_were_silent(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, family: str
) -> None:
    source, grams = swept(family)
    facts, _ = prune(swept(family), tmp_path / "out", what="mlp", ratio=0.3, multiple=8, repair=False)
    assert facts["removed"]["mlp_channels"] == 192 - facts["left"]["intermediate"] == 56
    pruned = {name: tensor for name, tensor in _weights(tmp_path / "out").items() if "down_proj.weight" in name}
    whole = _weights(source.path)

    def silence(model: Any) -> None:
        for index, layer in enumerate(model.model.layers):
            name = f"model.layers.{index}.mlp.down_proj.weight"
            old, new = whole[name].t().float(), pruned[name].t().float()
            stays = (old[:, None] == new[None]).all(-1).any(1)
            assert stays.sum() == 136
            layer.mlp.down_proj.weight[:, ~stays] = 0

    ids = read_ids(grams)[:2]
    assert torch.allclose(logits(tmp_path / "out", ids), logits(source.path, ids, silence), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_go_are_as_if_they_were_skipped(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, family: str
) -> None:
    source, grams = swept(family)
    facts, _ = prune(swept(family), tmp_path / "out", what="layers", count=2)
    gone = facts["removed"]["layers"]
    assert len(gone) == 2 and facts["left"]["layers"] == 2

    def skip(model: Any) -> None:
        model.model.layers = torch.nn.ModuleList(each for i, each in enumerate(model.model.layers) if i not in gone)
        model.config.num_hidden_layers = 2

    ids = read_ids(grams)[:2]
    assert torch.allclose(logits(tmp_path / "out", ids), logits(source.path, ids, skip), atol=1e-4, rtol=1e-4)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.weight_map}


@pytest.mark.parametrize("what", ["mlp", "heads"])
def test_repair_lowers_the_error_of_the_layers(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, what: str
) -> None:
    source, grams = swept("llama")
    ids = read_ids(grams)
    whole = logits(source.path, ids)
    errors = {}
    for repair in (True, False):
        out = tmp_path / str(repair)
        prune(swept("llama"), out, what=what, ratio=0.5, repair=repair)
        errors[repair] = float((logits(out, ids) - whole).square().mean())
    assert errors[True] < errors[False]


def test_what_is_written_is_what_was_chosen_to_be_read(swept: Callable[[str], tuple[Artifact, Path]]) -> None:
    """A cut of all three at once, read without being written: names, shapes, config and loss."""
    source, grams = swept("llama")
    cut = Cut({i: [1, 5, 7] for i in range(4)}, {i: [i % 4] for i in range(4)}, (1,))
    thin = Thinned(Checkpoint(source.path), cut, grams, 0.01)
    assert thin.facts.layers == 3 and thin.facts.intermediate == 189 and thin.facts.heads == 6
    shapes = {name: tuple(thin.tensor(name).shape) for name in thin.weight_map}
    assert shapes["model.layers.2.mlp.down_proj.weight"] == (128, 189)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (6 * 16, 128)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (3 * 16, 128)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (128, 6 * 16)
    assert not any(name.startswith("model.layers.3.") for name in shapes)
    first, third = (
        thin.tensor("model.layers.0.input_layernorm.weight"),
        thin.tensor("model.layers.1.input_layernorm.weight"),
    )
    whole = _weights(source.path)
    assert torch.equal(first, whole["model.layers.0.input_layernorm.weight"])
    assert torch.equal(third, whole["model.layers.2.input_layernorm.weight"])
    assert mean_loss(thin, read_ids(grams)[:2], Context()) > 0


def test_the_mean_loss_is_that_of_transformers(swept: Callable[[str], tuple[Artifact, Path]]) -> None:
    source, grams = swept("llama")
    ids = read_ids(grams)[:3]
    said = logits(source.path, ids)[:, :-1].flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(said, ids[:, 1:].flatten()))
    assert mean_loss(Checkpoint(source.path), ids, Context()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("what", "asked"), [("mlp", {"ratio": 0.3}), ("heads", {"count": 1}), ("layers", {"count": 1})]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_reads_the_pruned_model(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, family: str, what: str, asked: dict[str, Any]
) -> None:
    prune(swept(family), tmp_path / "out", what=what, **asked)
    write(tmp_path / "out", tmp_path / "model.gguf", "F32")
    assert inspect(tmp_path / "model.gguf").params == Checkpoint(tmp_path / "out").facts.params
    ids = read_ids(swept(family)[1])[0, :48]
    runtime = LlamaCppRuntime(tmp_path / "model.gguf", "cpu")
    theirs, ours = torch.tensor(runtime.logits(ids.numpy())), logits(tmp_path / "out", ids[None])[0]
    assert torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).min() > 0.9999
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_a_target_is_reached_at_the_least_damage_that_was_found(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path
) -> None:
    source, grams = swept("llama")
    whole = Checkpoint(source.path).facts
    facts, _ = prune(swept("llama"), tmp_path / "out", target={"ratio": 0.3})
    left = Checkpoint(tmp_path / "out").facts
    assert facts["params"] == left.params <= 0.7 * whole.params
    assert left.params > 0.55 * whole.params  # and not far more than was asked for
    told = facts["target"]
    assert set(told["chosen"]) == {"mlp", "heads", "layers"}
    assert told["damage"]["measured"] == pytest.approx(
        mean_loss(Checkpoint(tmp_path / "out"), read_ids(grams)[::2], Context()) - told["loss"], abs=1e-3
    )
    assert all(len(points) > 1 for points in told["damages"].values())
    named, _ = prune(swept("llama"), tmp_path / "named", target={"params": left.params})
    assert named["params"] <= left.params


def test_taylor_scores_are_the_first_order_change_of_the_loss(
    swept: Callable[[str], tuple[Artifact, Path]], sensitivity: Path, tmp_path: Path
) -> None:
    """Of every head, against the derivative by a gate on what it gives."""
    source, grams = swept("llama")
    ids = read_ids(grams)[::4]
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    gates = []
    for layer in model.model.layers:
        # a gate for every token and head, so that the size of each token's derivative can be taken
        gate = torch.ones(1, ids.shape[1], 8, 1, requires_grad=True)
        gates.append(gate)
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, gate=gate: (inputs[0].unflatten(-1, (8, -1)).mul(gate).flatten(-2),)
        )
    total = [torch.zeros(8) for _ in gates]
    for row in ids:
        said = model(row[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(said, row[1:], reduction="sum")
        for index, gradient in enumerate(torch.autograd.grad(loss, gates)):
            total[index] += gradient.abs().sum((0, 1, 3))
    seen = [each / ids.numel() for each in total]
    told = json.loads((sensitivity / "sensitivity.json").read_text())["heads"]
    for index, expected in enumerate(seen):
        assert torch.allclose(torch.tensor(told[str(index)]), expected, rtol=0.05, atol=1e-4)
    facts, _ = prune(swept("llama"), tmp_path / "out", sensitivity, what="heads", count=1, score="taylor")
    pairs = {index: each.view(4, 2).sum(1) for index, each in enumerate(seen)}
    assert facts["removed"]["kv_heads"] == {str(index): [int(pair.argmin())] for index, pair in pairs.items()}


def test_the_sweep_tells_the_angles_between_layers(swept: Callable[[str], tuple[Artifact, Path]]) -> None:
    source, grams = swept("llama")
    assert not (grams / STATES).exists()
    angles = read_index(grams)["angles"]
    assert [len(row) for row in angles] == [5, 4, 3, 2, 1]
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(read_ids(grams), output_hidden_states=True).hidden_states
    # transformers applies the last norm to the last of them
    cosine = torch.nn.functional.cosine_similarity(states[0].flatten(0, 1), states[2].flatten(0, 1), dim=-1)
    assert angles[0][2] == pytest.approx(float(cosine.acos().mean() / torch.pi), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "zeros"),
    [
        ({"method": "magnitude", "sparsity": 0.5}, 0.5),
        ({"method": "magnitude", "sparsity": 0.3, "scope": "global"}, 0.3),
        ({"method": "magnitude", "pattern": "2:4"}, 0.5),
        ({"method": "wanda", "sparsity": 0.6}, 0.6),
        ({"method": "wanda", "pattern": "1:4"}, 0.75),
        ({"method": "sparsegpt", "sparsity": 0.5}, 0.5),
        ({"method": "sparsegpt", "pattern": "4:8"}, 0.5),
    ],
)
def test_zeros_are_as_many_as_asked_and_the_person_is_told_what_they_are_worth(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, settings: dict[str, Any], zeros: float
) -> None:
    facts, context = prune(swept("llama"), tmp_path / "out", **settings)
    assert facts["sparsity"] == pytest.approx(zeros, abs=0.02)
    assert any("save neither bytes nor time" in warning for warning in context.warnings)
    found = [t for n, t in _weights(tmp_path / "out").items() if n.endswith("_proj.weight")]
    share = sum(int((t == 0).sum()) for t in found) / sum(t.numel() for t in found)
    assert share == pytest.approx(facts["sparsity"], abs=1e-6)
    assert logits(tmp_path / "out", read_ids(swept("llama")[1])[:1]).isfinite().all()


def test_what_is_ignored_keeps_its_weights(swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path) -> None:
    facts, _ = prune(swept("llama"), tmp_path / "out", method="wanda", sparsity=0.5, ignore=["*.0.mlp.*"])
    before, after = _weights(swept("llama")[0].path), _weights(tmp_path / "out")
    left = [name for name in before if name.endswith("_proj.weight") and torch.equal(before[name], after[name])]
    assert sorted(left) == [f"model.layers.0.mlp.{n}_proj.weight" for n in ("down", "gate", "up")]
    assert len(facts["kept"]) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gptq", "group_size": 32},
        {"method": "gptq", "group_size": 32, "bits": 3, "desc_act": True},
        {"method": "rtn", "group_size": 32, "sym": False},
        {"method": "awq", "group_size": 32},
        {"method": "nf4"},
        {"method": "fp4"},
        {"method": "w8a8"},
        {"method": "fp8"},
        {"method": "int8"},
    ],
)
def test_the_zeros_survive_every_quantizer(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    prune(swept("llama"), tmp_path / "pruned", method="sparsegpt", pattern="2:4")
    source = Artifact(tmp_path / "pruned", {"key": "y", "format": "hf"})
    grams, out = tmp_path / "grams", tmp_path / "out"
    grams.mkdir()
    out.mkdir()
    Sweep(samples=16, length=64).run(source, grams, Context())
    open_step("quantize", settings).run(source, out, Context(grams=grams))
    before, after = _weights(source.path), _weights(out)
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            stored = {n.rpartition(".")[2]: t for n, t in after.items() if n.startswith(name.removesuffix("weight"))}
            if settings["method"] in ("nf4", "fp4"):
                stored["weight"] = after[name]  # beside weight.absmax and the like
            zero = _zeros(stored, settings).view_as(weight)
            assert zero[weight == 0].all(), name
            assert float(zero.float().mean()) < 0.8, name


def _zeros(stored: dict[str, torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    """Returns which weights `[out, in]` are zero, from what a format stores."""
    match settings["method"]:
        case "gptq" | "rtn":
            return FORMATS["gptq"].unpacked({"bits": settings.get("bits", 4)}).weight(stored) == 0
        case "awq":
            return FORMATS["awq"].unpacked({}).weight(stored) == 0
        case "nf4" | "fp4":
            from bitsandbytes.functional import get_4bit_type

            packed = stored["weight"].flatten()
            codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
            return get_4bit_type(settings["method"], device="cpu")[codes] == 0
        case _:
            return stored["weight"].float() == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "say one of the three"),
        ({"what": "mlp", "method": "wanda", "sparsity": 0.5}, "say one of the three"),
        ({"what": "mlp"}, "mlp needs one of the two: ratio or count"),
        ({"what": "mlp", "ratio": 0.2, "count": 3}, "mlp needs one of the two"),
        ({"what": "layers", "ratio": 0.2, "repair": True}, "layers has no setting repair; it has ratio, count, contig"),
        ({"method": "wanda", "sparsity": 0.5, "pattern": "2:4"}, "wanda needs one of the two: sparsity or pattern"),
        ({"method": "wanda", "pattern": "4:2"}, "a pattern is N:M with 0 < N < M"),
        ({"method": "magnitude", "pattern": "2:4", "scope": "global"}, "a pattern is a choice among neighbours"),
        ({"what": "mlp", "ratio": 0.2, "score": "taylor"}, "the score taylor is for heads"),
        ({"target": "0.2"}, "such as ratio=0.2, or params=100M"),
        ({"target": {"ratio": 0.1, "params": "1M"}}, "a target is one of the two"),
        ({"what": "mlp", "ratio": 1.5}, "less than 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Prune.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"what": "heads", "ratio": 0.9}, "would leave no key/value heads: this model has 4 .* at most 3 can go"),
        ({"what": "layers", "count": 4}, "count 4 would leave no layers"),
        ({"what": "mlp", "ratio": 0.99}, "would leave no MLP channels"),
        ({"what": "heads", "ratio": 0.01}, "is none: ask for more"),
        ({"method": "wanda", "pattern": "2:5"}, "the pattern 2:5 does not divide the hidden_size width 128"),
        ({"target": {"params": "1000"}}, "the embedding alone has"),
        ({"target": {"params": "1B"}}, "already: ask for fewer"),
    ],
)
def test_what_this_model_cannot_have_is_refused(
    swept: Callable[[str], tuple[Artifact, Path]], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        Prune.model_validate(settings).check(Checkpoint(swept("llama")[0].path).facts)


def test_a_target_that_nothing_reaches_is_refused(
    swept: Callable[[str], tuple[Artifact, Path]], tmp_path: Path
) -> None:
    facts = Checkpoint(swept("llama")[0].path).facts
    with pytest.raises(RequestError, match="cannot be reached: half of the channels and layers"):
        prune(swept("llama"), tmp_path / "out", target={"params": facts.embedding_params + 1000})
