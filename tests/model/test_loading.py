"""What lies in a model directory, against what its architecture needs; and the forms that directories come in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import Checkpoint, facts_of
from lighten.model.forms import read_config
from lighten.model.loading import from_pretrained, readable
from lighten.model.source import Source, find
from lighten.pipeline.build import Builder
from lighten.pipeline.plan import make_plan
from lighten.pipeline.predict import Predictor
from lighten.pipeline.recipe import Recipe
from lighten.pipeline.stage import Stage
from lighten.pipeline.verbs import one_step
from lighten.pipeline.watcher import Silent
from lighten.step import Context
from lighten.store.artifact import Artifact
from lighten.store.store import Store

Tiny = Callable[..., Path]
Weights = dict[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def edited(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that makes a copy of a model with other weights, and other keys of config.json."""

    def make(change: Callable[[Weights], Weights] = dict, family: str = "llama", **config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny(family), folder)
        weights = change(load_file(folder / SINGLE))
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / SINGLE, {"format": "pt"})
        edit(folder / "config.json", **config)
        return folder

    return make


def edit(file: Path, **changes: Any) -> None:
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: each for key, each in value.items() if each is not ...}))


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def source(folder: Path, out: Path, **settings: Any) -> tuple[Weights, dict[str, Any], list[str]]:
    """Returns the weights, the config and the warnings of the source stage."""
    found, context = find(str(folder)), Context()
    step = Source(
        model=found.name,
        path=str(found.path),
        format="directory",
        identity=found.identity,
        surplus=found.surplus,
        notes=found.notes,
        **settings,
    )
    out.mkdir()
    step.run(Artifact(out, {}), out, context)
    return load_file(out / SINGLE), json.loads((out / "config.json").read_text()), context.warnings


@pytest.mark.parametrize("name", [UP, HEAD, EMBEDDING, "model.norm.weight"])
def test_a_weight_that_is_missing_is_named(edited: Callable[..., Path], name: str) -> None:
    folder = edited(without(name))
    with pytest.raises(RequestError, match=rf"lacks 1 of the 21 weights of LlamaForCausalLM: {name}\. .*random"):
        find(str(folder))


@pytest.mark.parametrize(
    ("prefix", "tool"), [("_orig_mod.", "torch.compile"), ("base_model.model.", "peft"), ("odd.", "")]
)
def test_a_prefix_that_most_names_share_is_named(edited: Callable[..., Path], prefix: str, tool: str) -> None:
    folder = edited(lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(RequestError, match=f"begin with '{prefix}'.*{tool}.*removeprefix"):
        find(str(folder))


def test_a_shape_is_told_with_the_one_that_was_expected(edited: Callable[..., Path]) -> None:
    folder = edited(lambda weights: {**weights, UP: weights[UP][:192]})
    with pytest.raises(RequestError, match=r"up_proj.weight is \[192, 256\] where config.json asks for \[256, 256\]"):
        find(str(folder))


def test_weights_without_use_are_left_out_and_said(edited: Callable[..., Path], tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32), "model.layers.2.mtp.weight": torch.ones(2)}
    weights, _, warnings = source(edited(lambda weights: {**weights, **more}), tmp_path / "out")
    assert not weights.keys() & more.keys()
    assert any("left out: model.layers.2.mtp.weight" in line for line in warnings)


def test_a_tied_head_that_differs_is_kept(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(tie_word_embeddings=True)
    head = load_file(folder / SINGLE)[HEAD].bfloat16()
    weights, config, warnings = source(folder, tmp_path / "out")
    assert torch.equal(weights[HEAD], head)
    assert config["tie_word_embeddings"] is False
    assert any("config.json ties the head" in line for line in warnings)


def test_a_tied_head_that_is_the_embedding_is_stored_once(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(lambda weights: {**weights, HEAD: weights[EMBEDDING].clone()}, tie_word_embeddings=True)
    weights, config, _ = source(folder, tmp_path / "out")
    assert HEAD not in weights
    assert config["tie_word_embeddings"] is True


def test_a_tied_embedding_may_have_the_name_of_the_head(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(
        lambda weights: {HEAD if name == EMBEDDING else name: w for name, w in weights.items()}, "llama-tied"
    )
    expected = load_file(folder / SINGLE)[HEAD].bfloat16()
    weights, _, _ = source(folder, tmp_path / "out")
    assert torch.equal(weights[EMBEDDING], expected)
    assert torch.equal(Checkpoint(folder).head(), load_file(folder / SINGLE)[HEAD])


def test_a_body_saved_alone_is_whole_where_its_head_is_tied(edited: Callable[..., Path], tmp_path: Path) -> None:
    def bare(weights: Weights) -> Weights:
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}

    folder = edited(bare, "llama-tied", architectures=["LlamaModel"])
    weights, config, _ = source(folder, tmp_path / "out")
    assert EMBEDDING in weights
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_body_saved_alone_lacks_its_head(edited: Callable[..., Path]) -> None:
    folder = edited(without(HEAD), architectures=["LlamaModel"])
    with pytest.raises(RequestError, match=r"saved without its head \(LlamaModel\): lm_head.weight"):
        find(str(folder))


def test_the_architecture_follows_from_the_model_type(edited: Callable[..., Path]) -> None:
    assert find(str(edited(architectures=...))).facts.architecture == "LlamaForCausalLM"


def test_an_encoder_stays_one_without_architectures(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "architectures" not in read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32}, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    ],
)
def test_settings_of_old_quantized_models_are_read(
    edited: Callable[..., Path], name: str, said: dict[str, Any], wanted: dict[str, Any]
) -> None:
    folder = edited()
    (folder / name).write_text(json.dumps(said))
    (folder / SINGLE).rename(folder / "gptq_model-4bit-32g.safetensors")
    checkpoint = Checkpoint(folder)
    assert wanted.items() <= (checkpoint.quantization or {}).items()
    assert set(checkpoint.weight_map.values()) == {"gptq_model-4bit-32g.safetensors"}
    with readable(folder) as view:
        config = json.loads((view / "config.json").read_text())
        assert config["quantization_config"] == checkpoint.quantization
        assert load_file(view / SINGLE).keys() == checkpoint.weight_map.keys()
    assert not view.exists()


def test_packed_weights_need_their_settings(edited: Callable[..., Path]) -> None:
    name = UP.removesuffix("weight") + "qweight"
    folder = edited(lambda weights: {**without(UP)(weights), name: torch.ones(8, 4, dtype=torch.int32)})
    with pytest.raises(RequestError, match=r"packed weights.*quantize_config.json"):
        find(str(folder))


def test_a_directory_that_is_right_is_read_as_it_is(tiny: Tiny) -> None:
    with readable(tiny()) as view:
        assert view == tiny()


def test_two_models_in_one_directory_are_refused(edited: Callable[..., Path]) -> None:
    folder = edited()
    shutil.copy(folder / SINGLE, folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / SINGLE), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(RequestError, match="holds two models"):
        find(str(folder))
    (folder / "model-00001-of-00001.safetensors").unlink()  # the index is stale: the single file is the model
    assert any("is not used" in note for note in find(str(folder)).notes)


def test_an_index_that_names_what_no_shard_holds_is_refused(edited: Callable[..., Path]) -> None:
    folder = edited()
    names = dict.fromkeys([*load_file(folder / SINGLE), "model.layers.9.mlp.up_proj.weight"], SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(RequestError, match=r"names model.layers.9.mlp.up_proj.weight, which model.safetensors"):
        find(str(folder))


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_pointer_of_git_is_no_file(edited: Callable[..., Path], name: str) -> None:
    folder = edited()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(RequestError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        find(str(folder))


def test_several_files_under_other_names_are_listed(edited: Callable[..., Path]) -> None:
    folder = edited()
    shutil.copy(folder / SINGLE, folder / "a.safetensors")
    (folder / SINGLE).rename(folder / "b.safetensors")
    with pytest.raises(RequestError, match=r"holds a.safetensors, b.safetensors.*call the one that is the model"):
        find(str(folder))


def test_sizes_under_text_config_are_read(edited: Callable[..., Path]) -> None:
    folder = edited(hidden_size=..., text_config={"hidden_size": 256})
    with pytest.raises(RequestError, match=r"config\.json has no 'num_attention_heads'"):
        find(str(folder))
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 300}
    facts = facts_of({"architectures": ["X"], "text_config": {"hidden_size": 256, **sizes}}, "here")
    assert (facts.hidden, facts.head_dim, facts.architecture) == (256, 64, "X")


def test_positions_described_twice_are_refused_where_they_differ(edited: Callable[..., Path]) -> None:
    folder = edited(rope_scaling={"type": "default"}, rope_theta=1e5)
    assert read_config(folder)
    edit(folder / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(RequestError, match="says factor twice"):
        read_config(folder)


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match=r"LORA adapter of org/base: add --merge-adapter"):
        find(str(tmp_path))


def test_encoders_and_others_with_surplus_heads_are_whole(tmp_path: Path) -> None:
    bert = BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    bert.save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / SINGLE)
    weights |= {"cls.seq_relationship.weight": torch.ones(2, 16), "bert.embeddings.position_ids": torch.ones(1, 512)}
    save_file(weights, tmp_path / "bert" / SINGLE, {"format": "pt"})
    assert find(str(tmp_path / "bert")).facts.family == "encoder"
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    assert find(str(tmp_path / "t5")).surplus == ()
    save_file(without("encoder.final_layer_norm.weight")(load_file(tmp_path / "t5" / SINGLE)), tmp_path / "t5" / SINGLE)
    with pytest.raises(RequestError, match=r"lacks 1 of the .* T5.*: encoder.final_layer_norm.weight"):
        find(str(tmp_path / "t5"))


def test_transformers_leaves_nothing_random(edited: Callable[..., Path]) -> None:
    folder = edited(without(UP))
    with pytest.raises(Failure, match=f"lacks {UP}"):
        from_pretrained(AutoModelForCausalLM, folder)


def test_a_source_keeps_its_type_where_that_shows(tiny: Tiny, tmp_path: Path) -> None:
    def stages(*types: str) -> list[Source]:
        variants: dict[str, Any] = {type: [{"export": {"format": "gguf", "type": type}}] for type in types}
        plan = make_plan(Recipe(name="x", model=str(tiny()), variants=variants))
        return [stage.step for stage in plan.stages if isinstance(stage.step, Source)]

    (alone,) = stages("F32")
    assert alone.dtype == "float32"
    assert {step.dtype for step in stages("F32", "Q8_0")} == {None, "float32"}
    (rounded,) = stages("Q8_0")
    assert rounded.key_config().keys() == {"format", "identity", "trust_remote_code"}
    expected = load_file(tiny() / SINGLE)[UP]
    kept, config, warnings = source(tiny(), tmp_path / "kept", dtype="float32")
    assert torch.equal(kept[UP], expected)
    assert config["dtype"] == "float32"
    assert not warnings
    weights, _, warnings = source(tiny(), tmp_path / "rounded")
    assert torch.equal(weights[UP], expected.bfloat16())
    assert any("rounded to bfloat16" in line for line in warnings)


def test_a_failure_is_told_once_in_the_person_s_words(edited: Callable[..., Path], tmp_path: Path) -> None:
    class Heard(Silent):
        lines: list[str]

        def __init__(self) -> None:
            self.lines = []

        def ended(self, stage: Stage, seconds: float | None, error: str | None) -> None:
            self.lines += [error or "done"]

    folder = edited(lambda weights: {**weights, UP: torch.full_like(weights[UP], torch.nan)})
    heard, settings = Heard(), {"format": "gguf", "type": "F16"}
    with pytest.raises(Failure, match=f"{UP} has NaN"):
        one_step("export", str(folder), tmp_path / "out", settings, artifacts=tmp_path / "store", watcher=heard)
    assert heard.lines == ["failed"]
    store = Store(tmp_path / "store")
    builder = Builder(store, Predictor(store), "cpu", heard, {}, False)
    builder.names["a" * 64] = "mine"
    for place in (store.objects / ("a" * 64), store.objects / f".tmp-{'a' * 64}-x1y2_z"):
        assert builder.in_words(f"{place}/{SINGLE} is cut short") == f"mine/{SINGLE} is cut short"
