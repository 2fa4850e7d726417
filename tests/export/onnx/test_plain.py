import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import lighten
from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import find_opener, open_runtime
from lighten.evaluate.runtimes.texts import TextRuntime, Texts
from lighten.export.onnx import plain as onnx_plain
from lighten.pipeline.verbs import measure
from tests.conftest import byte_level, write_tokenizer

Tiny = Callable[..., Path]
ToOnnx = Callable[..., Path]
SMALL = {
    "vocab_size": 1010,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**SMALL)),
    "bert-bare": (BertModel, BertConfig(**SMALL)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=1010, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "mbart": (
        MBartForConditionalGeneration,
        MBartConfig(
            vocab_size=1010,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
        ),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            kind, config = MODELS[name]
            torch.manual_seed(0)
            write_tokenizer(made[name], byte_level("gpt-2"))
            model = kind(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(made[name])
        return made[name]

    return save


def session(path: Path) -> Any:
    return onnx_plain.open_session(path)


def checked(path: Path) -> onnx.ModelProto:
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    return model


def axes(values: Any) -> dict[str, list[Any]]:
    return {each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values}


def test_a_causal_model_step_by_step_with_its_cache(tiny: Tiny, to_onnx: ToOnnx) -> None:
    out = to_onnx(tiny("llama"), graph="plain")
    model = checked(out / "model.onnx")
    shapes = axes(model.graph.input)
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 64]
    assert axes(model.graph.output)["logits"] == ["batch_size", "sequence_length", 1005 + 1]
    run = session(out / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 900, (2, 12))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny("llama"))(torch.from_numpy(ids)).logits.numpy()
    past = {name: np.zeros((2, 2, 0, 64), np.float32) for name in shapes if name.startswith("past")}
    found, done = [], 0
    for count in (5, 1, 1, 3, 2):  # a prompt, single tokens, and several after a cache
        logits, *present = run.run(
            None,
            {
                "input_ids": ids[:, done : done + count],
                "attention_mask": np.ones((2, done + count), np.int64),
                "position_ids": np.tile(np.arange(done, done + count), (2, 1)),
                **past,
            },
        )
        past = dict(zip(past, present, strict=True))
        found.append(logits)
        done += count
    assert np.abs(np.concatenate(found, 1) - expected).max() < 1e-5 * np.abs(expected).max()


def test_padding_on_the_left_changes_nothing(tiny: Tiny, to_onnx: ToOnnx) -> None:
    run = session(to_onnx(tiny("llama"), graph="plain") / "model.onnx")
    ids = np.random.default_rng(1).integers(0, 900, 6)
    empty = {
        each.name: np.zeros((2, 2, 0, 64), np.float32) for each in run.get_inputs() if each.name.startswith("past")
    }
    batch = np.stack([np.concatenate([[0, 0], ids]), np.concatenate([ids, ids[:2]])])
    mask = np.array([[0, 0, *[1] * 6], [1] * 8])
    places = np.array([[0, 0, *range(6)], range(8)])
    logits = run.run(["logits"], {"input_ids": batch, "attention_mask": mask, "position_ids": places, **empty})[0]
    assert np.abs(logits[0, 2:] - logits[1, :6]).max() < 1e-4


def test_int8_has_standard_operators_too(tiny: Tiny, to_onnx: ToOnnx) -> None:
    plain, rounded = (to_onnx(tiny("llama"), graph="plain", precision=precision) for precision in (None, "int8"))
    kinds = {node.op_type for node in checked(rounded / "model.onnx").graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= kinds
    sizes = [sum(file.stat().st_size for file in folder.glob("model.onnx*")) for folder in (plain, rounded)]
    assert sizes[1] < 0.6 * sizes[0]
    assert sorted(file.name for file in rounded.glob("*.onnx*")) == ["model.onnx", "model.onnx.data"]


def test_an_encoder_is_the_same(saved: Callable[[str], Path], to_onnx: ToOnnx) -> None:
    name = "bert"
    out = to_onnx(saved(name))
    checked(out / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 900, (3, 9))
    mask = np.ones_like(ids)
    mask[0, 6:] = 0
    run = session(out / "model.onnx")
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    found = run.run(None, feed)
    model = MODELS[name][0].from_pretrained(saved(name)).eval()
    with torch.no_grad():
        expected = model(**{key: torch.from_numpy(value) for key, value in feed.items()})
    for output, values in zip(run.get_outputs(), found, strict=True):
        wanted = expected[output.name].numpy()
        assert np.abs(values - wanted).max() < 1e-5 * np.abs(wanted).max()
    eight = to_onnx(saved(name), precision="int8")
    rough = session(eight / "model.onnx").run(None, feed)[0]
    checked(eight / "model.onnx")
    assert 0 < np.abs(rough - found[0]).max() < 0.05 * np.abs(found[0]).max()
    wide = to_onnx(saved(name), precision="int8", embedding="float")
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (eight, wide)]
    assert sizes[1] - sizes[0] > 2 * 1010 * 64  # three of four bytes of the embedding


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_sequence_to_sequence_decodes_the_same(saved: Callable[[str], Path], to_onnx: ToOnnx, name: str) -> None:
    out = to_onnx(saved(name))
    encoder, decoder = (out / f"{part}_model.onnx" for part in ("encoder", "decoder"))
    checked(encoder)
    checked(decoder)
    source = np.random.default_rng(0).integers(0, 900, (2, 7))
    mask = np.ones_like(source)
    mask[1, 5:] = 0
    target = np.random.default_rng(1).integers(0, 900, (2, 6))
    model = MODELS[name][0].from_pretrained(saved(name)).eval()
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(source),
            attention_mask=torch.from_numpy(mask),
            decoder_input_ids=torch.from_numpy(target),
        ).logits.numpy()
    first = session(encoder)
    _, *cross = first.run(None, {"input_ids": source, "attention_mask": mask})
    attended = dict(zip([each.name for each in first.get_outputs()][1:], cross, strict=True))
    run = session(decoder)
    past = {each.name: np.zeros((2, 4, 0, 16), np.float32) for each in run.get_inputs() if each.name.startswith("past")}
    found = []
    for place in range(6):
        feed = {"input_ids": target[:, place : place + 1], "encoder_attention_mask": mask, **attended, **past}
        logits, *present = run.run(None, feed)
        past = dict(zip(past, present, strict=True))
        found.append(logits)
    assert np.abs(np.concatenate(found, 1) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_the_graphs_answer_like_torch(saved: Callable[[str], Path], to_onnx: ToOnnx, name: str) -> None:
    ids = np.random.default_rng(0).integers(3, 900, (3, 7))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    answers = {}
    for place in (saved(name), to_onnx(saved(name))):
        runtime = cast(TextRuntime, open_runtime(place))
        assert runtime.capabilities == {"translates"}
        answers[runtime.name] = runtime.translate(Texts(ids, mask), 9)
        assert runtime.translate(Texts(ids[1:2, :5], mask[1:2, :5]), 9) == answers[runtime.name][1:2]
        runtime.close()
    assert answers["torch"] == answers["onnxruntime"]
    opener, place = find_opener(to_onnx(saved(name)))
    assert (place.name, opener.predicts_tokens(place)) == ("decoder_model.onnx", False)


def test_the_same_model_gives_the_same_bytes(saved: Callable[[str], Path], to_onnx: ToOnnx, tmp_path: Path) -> None:
    import shutil

    first = to_onnx(saved("bert"))
    second = to_onnx(shutil.copytree(saved("bert"), tmp_path / "elsewhere"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_an_encoder_goes_through_the_command_and_only_its_size_is_measured(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    bert = saved("bert-bare")
    artifact = lighten.export_model(str(bert), tmp_path / "out", format="onnx")
    assert artifact.format == "onnx"
    assert artifact.facts["graph"] == "plain"
    row = measure([str(tmp_path / "out")])["variants"][0]
    assert (row["status"], row["format"]) == ("ok", "onnx")
    assert row["bits_per_weight"] == pytest.approx(32, rel=0.1)
    from lighten.evaluate.perplexity.settings import Perplexity

    with pytest.raises(RequestError, match="BertModel is no causal language model: perplexity cannot be measured"):
        measure([str(tmp_path / "out")], perplexity=Perplexity())
    with pytest.raises(
        RequestError, match="the step export reads a causal language model, and BertModel is an encoder"
    ):
        lighten.export_model(str(bert), tmp_path / "no", format="gguf", type="F16")
    with pytest.raises(RequestError, match="is an ONNX directory: give the model that it was made from"):
        lighten.export_model(str(tmp_path / "out"), tmp_path / "no", format="onnx")


def test_a_graph_that_computes_something_else_is_refused(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten.model.checkpoint import Checkpoint
    from lighten.step import Context

    class Wrong:
        def __init__(self, real: Any) -> None:
            self.real = real

        def get_inputs(self) -> Any:
            return self.real.get_inputs()

        def run(self, names: Any, feed: Any) -> Any:
            return [value + 1 for value in self.real.run(names, feed)]

    monkeypatch.setattr(onnx_plain, "open_session", lambda path: Wrong(onnxruntime.InferenceSession(str(path))))
    with pytest.raises(Failure, match="gives another last_hidden_state than torch"):
        onnx_plain.write(saved("bert-bare"), tmp_path, Checkpoint(saved("bert-bare")).facts, "fp32", Context())
    assert list(tmp_path.iterdir()) == []
    assert json.loads((saved("bert-bare") / "config.json").read_text())["architectures"] == ["BertModel"]
