"""Text as people have it: files of every kind, and what is said about those that are not read."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lighten.data import files
from lighten.data.choices import load_choices
from lighten.data.documents import Turns
from lighten.data.text import identity, load_documents, load_text, read
from lighten.errors import Failure, LightenError, RequestError

TEXTS = ["The river ran past the mill.", "Der Fluß fließt. 河流", "two\u2028lines\u2028\x85in one"]
MESSAGES = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(folder: Path, name: str, separator: str, encoding: str = "utf-8") -> str:
    with (folder / name).open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows([["id", "text"], *((n, text) for n, text in enumerate(TEXTS))])
    return str(folder / name)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_json_lines_with_marks_and_other_line_ends(tmp_path: Path, mark: bytes, end: bytes) -> None:
    plain = lines(*({"text": text} for text in TEXTS)).encode()
    path = write(tmp_path, "a.jsonl", mark + plain.replace(b"\n", end))
    assert read(path, "calibration") == TEXTS
    assert identity(path, "calibration") == identity(write(tmp_path, "b.txt", "\n\n".join(TEXTS)), "calibration")


def test_every_kind_of_file_holds_the_same_text(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    made = [
        write(tmp_path, "rows.jsonl", lines(*rows)),
        write(tmp_path, "rows.ndjson", lines(*rows)),
        write(tmp_path, "rows.json", json.dumps(rows, indent=1)),
        write(tmp_path, "lines.json", lines(*rows)),
        write(tmp_path, "held.json", json.dumps({"version": 1, "data": rows})),
        write(tmp_path, "texts.json", json.dumps(TEXTS)),
        write(tmp_path, "no-suffix", lines(*rows)),
        write(tmp_path, "wide.jsonl", lines(*rows).encode("utf-16")),
        table(tmp_path, "rows.csv", ","),
        table(tmp_path, "excel.csv", ";", "utf-8-sig"),
        table(tmp_path, "rows.tsv", "\t"),
    ]
    for path in made:
        assert read(path, "perplexity") == TEXTS, path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_plain_text_by_its_mark(tmp_path: Path, encoding: str) -> None:
    for name in ("a.txt", "a.md", "a.rst"):
        assert load_text(write(tmp_path, name, "[a]\r\nß".encode(encoding)), "perplexity") == "[a]\nß"


def test_plain_text_stays_one_whatever_it_begins_with(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md"):
        assert load_text(write(tmp_path, name, '{"text": "x"}'), "perplexity") == '{"text": "x"}'


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": MESSAGES, "n": 1}, {"messages": MESSAGES[:1], "n": 2}]
    parquet.write_table(arrow.Table.from_pylist([{"text": text} for text in TEXTS]), tmp_path / "a.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read(str(tmp_path / "a.parquet"), "calibration") == TEXTS
    assert read(str(tmp_path / "b.parquet"), "calibration") == [Turns(tuple(MESSAGES)), Turns(tuple(MESSAGES[:1]))]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(Failure, match=r"b\.parquet is damaged"):
        read(str(tmp_path / "b.parquet"), "calibration")


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": MESSAGES}, MESSAGES),
        ({"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]}, MESSAGES),
        ({"instruction": "Say it.", "input": "", "output": "It."}, MESSAGES),
        ({"prompt": "Say it.", "completion": "It."}, MESSAGES),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
        ({"prompt": "Say it.", "chosen": MESSAGES, "rejected": MESSAGES[:1]}, MESSAGES),
        ({"question": "Say it.", "answer": "It."}, MESSAGES),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Say it."}]}]}, MESSAGES[:1]),
        (
            {"instruction": "Say it.", "input": "Now.", "output": "It."},
            [{**MESSAGES[0], "content": "Say it.\n\nNow."}, MESSAGES[1]],
        ),
    ],
)
def test_turns(tmp_path: Path, row: dict[str, Any], turns: list[dict[str, str]]) -> None:
    (found,) = read(write(tmp_path, "a.jsonl", lines(row)), "calibration")
    assert isinstance(found, Turns)
    assert list(found.messages) == turns


def test_a_pair_reads_as_text_and_a_conversation_does_not(tmp_path: Path) -> None:
    pair = write(tmp_path, "a.jsonl", lines({"prompt": "Say it.", "completion": "It."}))
    assert load_text(pair, "calibration") == "Say it.\n\nIt."
    assert load_text(pair, "calibration", lambda turns: f"<{len(turns)}>") == "<2>"
    talk = write(tmp_path, "b.jsonl", lines({"messages": MESSAGES}))
    with pytest.raises(RequestError, match=r"b\.jsonl holds conversations, and the model has no chat template"):
        load_documents(talk, "calibration")
    assert identity(pair, "calibration") != identity(talk, "calibration")


def test_a_field_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"body": "one", "talk": MESSAGES}, {"body": "two", "talk": MESSAGES}))
    from lighten.data.origin import Origin

    assert load_text(Origin(path=path, field="body"), "perplexity") == "one\n\ntwo"
    assert isinstance(read(Origin(path=path, field="talk"), "perplexity")[0], Turns)
    with pytest.raises(RequestError, match=r"no field 'bodi'; its fields are body, talk"):
        read(Origin(path=path, field="bodi"), "perplexity")


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.jsonl", lines({"title": "x", "body": "y"}), RequestError, r"its fields are title, body: name one of them"),
        ("a.csv", "title,body\nx,y\n", RequestError, r"its fields are title, body"),
        ("a.csv", "text,n\nx,1,2\n", Failure, r"a\.csv:2: other columns than the header's: text, n"),
        ("a.json", '{"a": 1,\n "b": }', Failure, r"a\.json:2: not valid JSON"),
        ("a.json", "3", RequestError, "no list of records"),
        ("a.jsonl", lines({"messages": [{"role": "narrator", "content": "x"}]}), Failure, "speaker 'narrator'"),
        ("a.jsonl", lines({"messages": MESSAGES}, {"messages": "x"}), Failure, r"a\.jsonl:2: .*list of messages"),
        ("a.jsonl", lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), Failure, "holds no text"),
        ("a.jsonl", '{"text": ' + "[" * 50_000, Failure, r"a\.jsonl:1: .*nested too deep"),
        ("a.json", '{"text": ' * 50_000, Failure, r"a\.json cannot be read: .*nested too deep"),
        ("a.json", '{"text": ' + "9" * 5000 + "}", Failure, r"a\.json cannot be read: Exceeds the limit"),
        ("a.jsonl", '{"text": "\\uD83D"}', Failure, r"a\.jsonl:1: .*half of a character, '\\ud83d'"),
        ("a.gz", b"\x1f\x8b\x08\x00", RequestError, "compressed by gzip"),
        ("a.parquet", "text", Failure, "no parquet file"),
        ("a.txt", b"a\0b", RequestError, "no text"),
        ("a.txt", "Fluß".encode("latin-1"), Failure, r"not UTF-8 text \(byte 4\)"),
    ],
)
def test_what_is_not_read(
    tmp_path: Path, name: str, content: str | bytes, error: type[LightenError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read(write(tmp_path, name, content), "calibration")


def test_pieces_of_a_large_file_are_spread_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGE", 10_000)
    monkeypatch.setattr(files, "LEAST", 0)
    monkeypatch.setattr(files, "PIECES", 4)
    rows = [{"text": f"ß {number:04d} " + "x" * 80} for number in range(1000)]
    for path in (write(tmp_path, "a.jsonl", lines(*rows)), table_of(tmp_path, rows)):
        found = [int(str(text).split()[1]) for text in read(path, "calibration", letters=4_000)]
        assert 20 < len(found) < 80
        assert found == sorted(set(found))
        assert found[0] < 30
        assert any(450 < each < 550 for each in found)
        assert len(read(path, "calibration")) == 1000
    text = write(tmp_path, "a.txt", "\n".join(str(row["text"]) for row in rows))
    assert 3_000 < sum(len(str(each)) for each in read(text, "calibration", letters=4_000)) < 8_000


def table_of(folder: Path, rows: list[dict[str, str]]) -> str:
    with (folder / "b.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([row["text"]] for row in rows)])
    return str(folder / "b.csv")


def test_tasks_are_read_from_the_same_files(tmp_path: Path) -> None:
    record = {"activity_label": "a", "ctx": "b\u2028c", "endings": ["d", "e"], "label": 1}
    wanted = load_choices(write(tmp_path, "a.jsonl", lines(record)))
    assert wanted[0].label == 1
    assert load_choices(write(tmp_path, "b.jsonl", b"\xef\xbb\xbf" + lines(record).encode())) == wanted
    assert load_choices(write(tmp_path, "c.json", json.dumps([record]))) == wanted
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [list(record), [json.dumps(v) if isinstance(v, list) else v for v in record.values()]]
        )
    assert load_choices(str(tmp_path / "d.csv")) == wanted
