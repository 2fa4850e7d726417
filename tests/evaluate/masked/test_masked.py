from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

from lighten.errors import RequestError
from lighten.evaluate.masked.settings import Masked
from lighten.evaluate.masked.work import hide, measure
from lighten.evaluate.paired import values
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.texts import Texts
from lighten.step import silent
from tests.encoders import tiny_encoder


def test_a_share_of_the_plain_tokens_is_hidden() -> None:
    ids = np.tile(np.arange(20), (3, 1))
    mask = np.ones_like(ids)
    mask[1, 3:] = 0
    places = hide(Texts(ids, mask), np.array([0, 1]), 0.3, np.random.default_rng(0))
    assert places.sum(1).tolist() == [5, 1, 5]
    assert not places[:, :2].any() and not (places & (mask == 0)).any()
    assert (places[0] != places[2]).any()


def test_found_tokens_are_counted(tmp_path: Path) -> None:
    folder, out = tiny_encoder(tmp_path / "m", BertForMaskedLM), tmp_path / "out"
    out.mkdir()
    model = BertForMaskedLM.from_pretrained(folder)
    (often,) = AutoTokenizer.from_pretrained(folder)(" the")["input_ids"]
    with torch.no_grad():  # it always answers with one token, which some of the hidden ones are
        model.cls.predictions.bias.zero_()
        model.cls.predictions.bias[often] = 1000.0
    model.save_pretrained(folder)
    settings = Masked(samples=40)
    result = measure(Request(settings, folder, folder, out, "cpu", trust_remote_code=False), silent)
    right = values(out)["right"]
    assert result.masked.n == len(right) > 40
    assert result.masked.acc == right.mean() and 0 < right.mean() < 0.3
    again = tmp_path / "again"
    again.mkdir()
    measure(Request(settings, folder, folder, again, "cpu", trust_remote_code=False), silent)
    assert np.array_equal(values(again)["right"], right)


def test_without_a_token_for_gaps(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, BertForMaskedLM)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("mask_token", "unk_token"))
    with pytest.raises(RequestError, match="has no token for a gap"):
        measure(Request(Masked(samples=2), folder, folder, tmp_path, "cpu", trust_remote_code=False), silent)
