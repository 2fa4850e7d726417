"""Encoders and sequence-to-sequence models through the sweep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from lighten.compress.calibrate.sweep import Sweep
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.texts import Texts
from lighten.model.blockwise import BlockwiseModel
from lighten.model.grams import read_layer
from lighten.model.tokens import paired_ids
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.conftest import byte_level, write_tokenizer
from tests.encoders import tiny_encoder
from tests.translators import tiny_translator

SIDES = {
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 96))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 64,
    "vocab_size": 1010,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = T5Config(vocab_size=1010, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0)


def _saved(folder: Path, kind: Any, config: Any) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    write_tokenizer(folder, byte_level("gpt-2"))
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda folder: tiny_encoder(folder, BertModel, num_hidden_layers=2),
    "bert-masked": lambda folder: tiny_encoder(folder, BertForMaskedLM, num_hidden_layers=2),
    "marian": lambda folder: tiny_translator(
        folder, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=96, init_std=0.1
    ),
    "t5": lambda folder: _saved(folder, T5ForConditionalGeneration, T5),
    "bart": lambda folder: _saved(folder, BartForConditionalGeneration, BartConfig(**SIDES)),
    "m2m": lambda folder: _saved(folder, M2M100ForConditionalGeneration, M2M100Config(**SIDES)),
}


@pytest.mark.parametrize("name", MODELS)
def test_swept_and_quantized(name: str, tmp_path: Path) -> None:
    path = MODELS[name](tmp_path / "model")
    grams = tmp_path / "grams"
    grams.mkdir()
    sweep = Sweep(samples=4, length=16, data="phrases" if name == "marian" else "builtin")
    sweep.run(Artifact(path, {}), grams, Context())
    blocks = BlockwiseModel(path)
    linears = sum(len(layer.linears) for layer in blocks.anatomy.layers)
    assert len(blocks.anatomy.layers) == (2 if name.startswith("bert") else 4)
    assert linears == {"bert": 12, "bert-masked": 12, "t5": 2 * 6 + 2 * 10}.get(name, 2 * 6 + 2 * 10)
    ids = np.random.default_rng(0).integers(3, 400, (2, 7))
    texts, found = Texts(ids, np.ones_like(ids)), {}
    for method in ({"method": "gptq", "bits": 8, "group_size": 32}, {"method": "w8a8"}):
        out = tmp_path / str(method["method"])
        out.mkdir()
        step = open_step("quantize", method)
        told = step.run(Artifact(path, {}), out, Context(grams=grams))
        assert told["coverage"] > 0.3
        found[out] = _states(open_runtime(out), texts)
    wanted = _states(open_runtime(path), texts)
    for out, states in found.items():
        gap = np.abs(states - wanted).max() / np.abs(wanted).max()
        assert 1e-5 < gap < 0.1, (out.name, gap)


def _states(runtime: Any, texts: Texts) -> Any:
    """Returns what a model computes of texts: states, or the logits of the first token of an answer."""
    if "encodes" in runtime.capabilities:
        return runtime.states(texts)
    fed = {"input_ids": torch.from_numpy(texts.ids), "decoder_input_ids": torch.from_numpy(texts.ids)}
    with torch.inference_mode():
        return runtime.model(**fed).logits.numpy()


def test_the_grams_are_those_of_the_whole_model(tmp_path: Path) -> None:
    path = MODELS["marian"](tmp_path / "model")
    (tmp_path / "grams").mkdir()
    Sweep(samples=3, length=16, data="phrases").run(Artifact(path, {}), tmp_path / "grams", Context())
    sources, targets = (torch.from_numpy(each) for each in paired_ids(path, "phrases", 3, 16))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    seen: dict[str, torch.Tensor] = {}
    names = {"model.encoder.layers.1.fc2": None, "model.decoder.layers.1.encoder_attn.k_proj": None}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
    with torch.no_grad():
        model(input_ids=sources, decoder_input_ids=targets)
    for name, inputs in seen.items():
        layer = 1 if "encoder.layers" in name else 3
        grams, read_by = read_layer(tmp_path / "grams", layer)
        gram = grams[read_by[name.partition(".layers.1.")[2]]].matrix()
        wanted = inputs.t() @ inputs
        assert ((gram - wanted).norm() / wanted.norm()) < 0.03  # the sweep computes in the fast type
