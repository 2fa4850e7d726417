import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from lighten.errors import Failure
from lighten.evaluate.paired import VALUES, values
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.texts import Texts
from lighten.evaluate.similarity.settings import EMBEDDINGS, Similarity
from lighten.evaluate.similarity.work import measure, pooled, takes_first
from lighten.step import silent
from tests.encoders import tiny_encoder


def test_embeddings_are_means_over_the_tokens(tmp_path: Path) -> None:
    model, out = tiny_encoder(tmp_path / "m", BertModel), tmp_path / "out"
    out.mkdir()
    settings = Similarity(samples=5, batch=2)
    assert measure(Request(settings, model, model, out, "cpu", trust_remote_code=False), silent).runtime == "torch"
    found = values(out)[EMBEDDINGS]
    plain, tokenizer = BertModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    for text, vector in zip(settings.sentences(), found, strict=True):
        read = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            wanted = plain(input_ids=read["input_ids"]).last_hidden_state[0].mean(0).numpy()
        assert np.allclose(vector, wanted, atol=1e-5)


def test_padding_does_not_count_and_the_first_state_can() -> None:
    states = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    texts = Texts(np.zeros((2, 3), np.int64), np.array([[1, 1, 0], [1, 1, 1]]))
    assert pooled(states, texts, first=False).tolist() == [[1, 2], [8, 9]]
    assert pooled(states, texts, first=True).tolist() == [[0, 1], [6, 7]]


def test_the_model_says_which(tmp_path: Path) -> None:
    assert not takes_first(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert takes_first(tmp_path)


def test_a_row_has_the_cosines(tmp_path: Path) -> None:
    vectors = {"a": [[1.0, 0], [0, 2]], "b": [[1.0, 0], [3, 3]], "c": [[1.0], [1]]}
    for name, rows in vectors.items():
        (tmp_path / name).mkdir()
        save_file({EMBEDDINGS: np.array(rows, np.float32)}, tmp_path / name / VALUES)
    row: dict[str, dict[str, float]] = {}
    Similarity().add_change(row, tmp_path / "b", tmp_path / "a")
    assert row["similarity"]["least"] == pytest.approx(2**-0.5)
    assert row["similarity"]["mean"] == pytest.approx((1 + 2**-0.5) / 2) and row["similarity"]["n"] == 2
    with pytest.raises(Failure, match="cannot be compared"):
        Similarity().add_change(row, tmp_path / "c", tmp_path / "a")


def test_a_model_that_fills_gaps_has_embeddings_too(tmp_path: Path) -> None:
    model, out = tiny_encoder(tmp_path / "m", BertForMaskedLM), tmp_path / "out"
    out.mkdir()
    measure(Request(Similarity(samples=2), model, model, out, "cpu", trust_remote_code=False), silent)
    assert values(out)[EMBEDDINGS].shape == (2, 64)
