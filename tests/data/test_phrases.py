import json
from pathlib import Path

import pytest

from lighten.data import pairs, phrases
from lighten.data.text import identity, load_text
from lighten.errors import RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.translator import FILES, FOLDER
from lighten.model.translator.making import make_tokenizer, train


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (21, "twenty-one", "einundzwanzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (342, "three hundred and forty-two", "dreihundertzweiundvierzig"),
        (1001, "one thousand and one", "eintausendeins"),
        (21_000, "twenty-one thousand", "einundzwanzigtausend"),
        (
            731_016,
            "seven hundred and thirty-one thousand and sixteen",
            "siebenhunderteinunddreißigtausendsechzehn",
        ),
    ],
)
def test_numbers_in_words(number: int, english: str, german: str) -> None:
    assert (phrases.english(number), phrases.german(number)) == (english, german)


def test_the_splits_share_no_phrase_and_stay_the_same() -> None:
    train, test = phrases.some("train", 5000), phrases.some("test", 500)
    assert not {pair.source for pair in train} & {pair.source for pair in test}
    assert test == phrases.some("test", 500) and len(set(test)) > 450


def test_the_tokenizer_is_made_from_the_phrases() -> None:
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == json.loads(make_tokenizer().to_str())


def test_pairs_of_a_file(tmp_path: Path) -> None:
    rows = [{"source": "a cat", "target": "eine Katze"}, {"source": "a dog", "target": "ein Hund"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.tsv").write_text("source\ttarget\na cat\teine Katze\na dog\tein Hund\n")
    found = pairs.load(f"pairs:{tmp_path / 'p.jsonl'}", "train")
    assert [pair._asdict() for pair in found] == rows
    assert pairs.load(str(tmp_path / "p.tsv"), "test", 1) == found[:1]


def test_both_texts_of_a_pair_are_text_too() -> None:
    assert "zwölf" in load_text("phrases", "calibration")
    assert identity("phrases", "calibration") != identity("phrases", "perplexity")


def test_what_is_no_file_of_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"source": "a cat", "text": "eine Katze"}\n')
    with pytest.raises(RequestError, match=r"p\.jsonl:1 is no pair: a record needs the texts `source` and `target`"):
        pairs.load(str(tmp_path / "p.jsonl"), "test")
    with pytest.raises(RequestError, match="there is no file nowhere"):
        pairs.load("pairs:nowhere.tsv", "test")


def test_the_demo_model_is_trained_in_stages(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train(
        tmp_path, lambda done, total, note: seen.append((done, total)), stages=((1, 3, 1e-3), (2, 2, 1e-3)), count=300
    )
    assert seen == [(step, 5) for step in range(1, 6)]
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.facts.task, checkpoint.facts.layers) == ("seq2seq", 2)
    assert all((tmp_path / name).is_file() for name in FILES)
