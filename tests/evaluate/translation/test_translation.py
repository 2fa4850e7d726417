from pathlib import Path
from typing import cast

import numpy as np
import pytest
import sacrebleu
import torch
from transformers import AutoModelForSeq2SeqLM

from lighten.data import phrases
from lighten.errors import RequestError
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.texts import Reader, TextRuntime
from lighten.evaluate.sentences import work as sentences
from lighten.evaluate.sentences.settings import Sentences, sentences_of
from lighten.evaluate.translation import settings as settings_module
from lighten.evaluate.translation import work
from lighten.evaluate.translation.settings import Translation
from lighten.model.checkpoint import Checkpoint
from lighten.step import silent
from tests.translators import tiny_translator

TEXTS = [pair.source for pair in phrases.some("test", 6)]


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_translator(tmp_path_factory.mktemp("marian"), encoder_layers=1, decoder_layers=1)


def test_answers_are_those_of_transformers(marian: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(marian)
    reader = Reader(marian, 128)
    read = reader.read(TEXTS)
    wanted = model.generate(
        input_ids=torch.from_numpy(read.ids), attention_mask=torch.from_numpy(read.mask), max_new_tokens=12, num_beams=1
    )
    answers = [[each for each in row[1:].tolist() if each not in (0, 2)] for row in wanted]
    assert len({tuple(each) for each in answers}) > 1
    runtime = cast(TextRuntime, open_runtime(marian))
    assert (runtime.name, runtime.capabilities) == ("torch", {"translates"})
    assert runtime.translate(read, 12) == answers
    assert [runtime.translate(reader.read([text]), 12)[0] for text in TEXTS] == answers


def test_the_score_is_that_of_sacrebleu() -> None:
    wanted = [pair.target for pair in phrases.some("test", 40)]
    found = [text.replace("um ", "am ") for text in wanted]
    scored = work.score(found, wanted)
    assert scored.bleu == sacrebleu.corpus_bleu(found, [wanted]).score
    assert scored.chrf == sacrebleu.corpus_chrf(found, [wanted]).score
    assert scored.ci95 and scored.ci95[0] < scored.bleu < scored.ci95[1]
    assert scored.exact == np.mean([one == other for one, other in zip(found, wanted, strict=True)])
    assert work.score(wanted, wanted).bleu == pytest.approx(100)


def test_translations_are_measured_and_kept(marian: Path, tmp_path: Path) -> None:
    settings = Translation(samples=5, most=4, batch=2)
    request = Request(settings, marian, marian, tmp_path, "cpu", trust_remote_code=False)
    result = work.measure(request, silent)
    lines = (tmp_path / work.FILE).read_text().splitlines()
    assert result.translation.n == len(lines) == 5 and result.runtime == "torch"


def test_sentences_are_timed_in_batches(marian: Path, tmp_path: Path) -> None:
    settings = Sentences(samples=4, batch=[1, 3], repeats=1, most=3)
    request = Request(settings, marian, marian, tmp_path, "cpu", trust_remote_code=False)
    result = sentences.measure(request, silent)
    assert [(row.batch, row.n) for row in result.sentences] == [(1, 4), (3, 4)]
    for row in result.sentences:
        assert 0 < row.latency_ms.p50 <= row.latency_ms.p95 <= row.latency_ms.p99 and row.sentences_s > 0


def test_sentences_of_a_text() -> None:
    text = "Too short.\nHere is a line of seven words. And this is another line of words.\n= A heading =\n"
    assert sentences_of(text, 5) == ["Here is a line of seven words.", "And this is another line of words."]
    with pytest.raises(RequestError, match="no sentences"):
        sentences_of("= A heading =", 5)


def test_without_sacrebleu_the_extra_is_named(marian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"lighten\[translation\]"):
        Translation().check(Checkpoint(marian).facts, "marian")
