import json
from pathlib import Path

import pytest

from lighten.data.text import builtin_text, digest, load_text
from lighten.errors import Failure, RequestError

FOLDER = Path(__file__).parents[2] / "lighten" / "data" / "builtin"
REGISTERS = {"encyclopaedic", "narrative", "dialogue", "instructions", "code", "tables"}


@pytest.mark.parametrize("part", ["calibration", "perplexity"])
def test_builtin_text_is_large_enough_and_in_every_register(part: str) -> None:
    assert {file.stem for file in (FOLDER / part).glob("*.txt")} == REGISTERS
    assert len(builtin_text(part).encode()) >= 60_000
    assert load_text("builtin", part) == builtin_text(part)
    assert "---\n" not in builtin_text(part)[:4]


def test_the_two_parts_share_no_run_of_twelve_words() -> None:
    grams = []
    for part in ("calibration", "perplexity"):
        words = builtin_text(part).split()
        grams.append({tuple(words[start : start + 12]) for start in range(len(words) - 11)})
    assert grams[0] & grams[1] == set()


def test_a_short_prefix_holds_every_register() -> None:
    first = {register: (FOLDER / "calibration" / f"{register}.txt").read_text()[:40] for register in REGISTERS}
    prefix = builtin_text("calibration")[:20_000]
    assert all(start.strip() in prefix for start in first.values())


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert load_text(str(tmp_path / "a.txt"), "perplexity") == "one\n\ntwo"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two")) + "\n\n")
    assert load_text(str(tmp_path / "a.jsonl"), "perplexity") == "one\n\ntwo"
    assert digest("one\n\ntwo") == digest(load_text(str(tmp_path / "a.txt"), "calibration"))


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.txt", None, RequestError, "check the path"),
        ("a.txt", b"\xfa\xfb", Failure, "not UTF-8"),
        ("b.txt", b"\xff\xfe\x00", Failure, "not UTF-16"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', Failure, r"a\.jsonl:2: .*\"text\""),
        ("b.jsonl", b"not json\n", Failure, r"b\.jsonl:1"),
        ("c.jsonl", b'{"text": 3}\n', Failure, "must be a string"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        load_text(str(tmp_path / name), "perplexity")
