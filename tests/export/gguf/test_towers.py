"""The language model inside a model that also sees: llama.cpp's logits are those of the whole for a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from lighten.compress.calibrate.sweep import Sweep
from lighten.export.gguf import quantize as gguf_quantize
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.write import Draft
from lighten.model import stream
from lighten.model.checkpoint import Checkpoint
from lighten.model.gguf.towers import model_of, name_in
from lighten.model.weight_checks import check
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.conftest import byte_level, write_tokenizer
from tests.export.gguf.test_every_family import rounded_gelu
from tests.export.gguf.test_write import logits_of
from tests.families import models

__all__ = ["rounded_gelu"]
Make = Callable[[str], Path]


@pytest.fixture
def whole(tmp_path: Path) -> Make:
    def make(kind: str) -> Path:
        (folder := tmp_path / "model").mkdir()
        vocab = write_tokenizer(folder, byte_level("gpt-2")) + 3
        config = models._small(getattr(transformers, f"{kind}Config"), vocab, {})
        torch.manual_seed(1)
        model: Any = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float()
        models._randomise(model)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.usefixtures("rounded_gelu")
@pytest.mark.parametrize(("kind", "seeing"), [("Gemma3", "vision_tower"), ("Qwen3_5Moe", "visual")])
def test_the_file_has_the_language_model(whole: Make, tmp_path: Path, kind: str, seeing: str) -> None:
    source = whole(kind)
    assert check({"path": source, "name": "x"}, lambda *_: None)["unchecked"] is None
    Gguf(format="gguf", type="F16").check(Checkpoint(source).facts)
    draft = Draft(source)
    (warning,) = draft.warnings
    assert "only the language model goes into the file: " in warning and seeing in warning
    assert len(draft.checkpoint.others) + len(draft.checkpoint.shapes()) == len(Checkpoint(source).weight_map)
    draft.save(tmp_path / "m.gguf", draft.types("F32"), file_type=0)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(3, 1000, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].log_softmax(-1)
    found = torch.from_numpy(np.asarray(logits_of(tmp_path / "m.gguf", ids[0].tolist()))).log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).max()) < 2e-6


def test_importance_is_that_of_the_language_model(whole: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    source = whole("Gemma3")
    (grams := tmp_path / "grams").mkdir()
    Sweep(samples=2, length=32).run(Artifact(source, {"key": "x", "format": "hf"}), grams, Context())
    found = gguf_quantize.importance(grams, model_of(source))
    draft = Draft(source)
    assert set(found) == {
        piece.name for piece in draft.pieces.values() if piece.is_matrix and piece.name.startswith("blk.")
    }


def test_names_of_the_parts() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}
    assert name_in(config, "language_model.model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert name_in(config, "model.language_model.norm.weight") == "model.norm.weight"
    assert name_in(config, "language_model.lm_head.weight") == name_in(config, "lm_head.weight") == "lm_head.weight"
    assert name_in(config, "vision_tower.layers.0.weight") is None
    assert name_in({"architectures": ["LlamaForCausalLM"]}, "vision_tower.x") == "vision_tower.x"
