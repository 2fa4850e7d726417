"""Files to calibrate and measure on that belong to somebody else, damaged or made with intent."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lighten.data.choices import digest, load_choices
from lighten.data.documents import PAIRS
from lighten.data.origin import Origin
from lighten.data.text import identity, load_documents, load_text
from tests.fuzz.frame import answers, fuzz

ROWS = [
    {"text": "The river ran past the mill."},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Say it."}]},
            {"role": "bot", "content": "It."},
        ]
    },
    {"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]},
    {"system": "Be brief.", "instruction": "Say it.", "input": "Now.", "output": "It."},
    {"prompt": [{"role": "user", "content": "Say it."}], "chosen": [{"role": "assistant", "content": "It."}]},
    {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1},
]
NAMES = [
    *("text", "messages", "conversations", "role", "from", "content", "value", "type", "system", "input", "tool_calls"),
    *(name for pair in PAIRS for name in pair),
]
FILES = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in [ROWS[1]] * 3),
    "a.json": json.dumps([ROWS[3]] * 2, indent=1),
    "a.csv": 'id,text\n1,"The ""river"" ran"\n2,"past\nthe mill"\n',
    "a.tsv": "id\ttext\n1\tThe river\n",
    "a.txt": "The river\r\nran past the mill.\n",
    "a": '{"data": [{"text": "The river"}, {"text": "ran"}]}',
}
PIECES = [
    *('"', ",", "\n", "\r", "\t", "{", "}", "[", "]", ":", "\\", "\0", "\u2028", "\ufeff", "null", "NaN", "\\ud800"),
    *(
        "[" * 50_000,
        '{"a":' * 50_000,
        '[{"a":' * 50_000,
        "9" * 5000,
        "1e999",
        "x" * 200_000,
        "a,b,c\n" * 999,
        "x," * 999,
    ),
]
STARTS = [
    b"",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xff\xfe\0\0",
    b"\0\0\xfe\xff",
    b"PAR1",
    b"\x1f\x8b",
    b"GGUF",
]
cuts = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 9), st.sampled_from(PIECES) | st.text(max_size=3)), max_size=3
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "\ud800", "x" * 5000, "text", 10**400, "[" * 50_000, "9" * 5000])
)
names = st.sampled_from(NAMES) | st.text(max_size=4) | st.just("x" * 5000)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def spelled(messages: Any) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def used(file: Path, field: str | None = None) -> None:
    """Does with a text whatever is done with one; what is wrong with it may be said once at each."""
    origin = Origin(path=str(file), field=field)
    text = answers(load_text, origin, "calibration", spelled)
    if isinstance(text, str):
        assert text.encode().decode() == text
        assert isinstance(answers(identity, origin, "calibration"), str)
    answers(load_documents, origin, "perplexity")


def test_the_files_that_are_damaged_are_sound(folder: Path) -> None:
    for name, content in FILES.items():
        text = answers(load_text, str(written(folder / name, content.encode())), "calibration", spelled)
        assert isinstance(text, str), text
    assert len(answers(load_choices, str(written(folder / "c.jsonl", json.dumps(ROWS[-1]).encode())))) == 1


@fuzz(examples=150)
@given(
    name=st.sampled_from(list(FILES)),
    changes=cuts,
    start=st.sampled_from(STARTS),
    encoding=st.sampled_from(["utf-8", "utf-16-le"]),
)
def test_a_damaged_file_is_read_or_refused(
    folder: Path, name: str, changes: list[tuple[int, int, str]], start: bytes, encoding: str
) -> None:
    text = FILES[name]
    for place, length, what in changes:
        place %= len(text) + 1
        text = text[:place] + what + text[place + length :]
    used(written(folder / name, start + text.encode(encoding, errors="surrogatepass")))


@fuzz(examples=150)
@given(
    which=st.sampled_from(ROWS),
    changes=st.dictionaries(names, values, max_size=3),
    more=st.lists(values, max_size=2),
    field=st.none() | st.sampled_from(NAMES),
)
@example(which={}, changes={f"{n:04d}": n for n in range(1000)}, more=[], field=None)
def test_records_of_any_kind(
    folder: Path, which: dict[str, Any], changes: dict[str, Any], more: list[Any], field: str | None
) -> None:
    rows = [{**which, **changes}, *more]
    made = "\n".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) for row in rows)
    used(written(folder / "rows.jsonl", made.encode(errors="surrogatepass")), field)


@fuzz(examples=80)
@given(changes=st.dictionaries(st.sampled_from(list(ROWS[-1])), values, min_size=1), table=st.booleans())
@example(changes={"ctx_a": "[" * 50_000}, table=False)
@example(changes={"endings": ["[" * 50_000]}, table=False)
@example(changes={"label": 1e999}, table=False)
def test_questions_of_any_kind(folder: Path, changes: dict[str, Any], table: bool) -> None:
    row = {**ROWS[-1], **changes}
    cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
    quoted = [cell.replace('"', '""') for cell in cells]
    made = ",".join(row) + "\n" + ",".join(f'"{cell}"' for cell in quoted) if table else json.dumps(row)
    file = written(folder / ("c.csv" if table else "c.jsonl"), made.encode(errors="surrogatepass"))
    found = answers(load_choices, str(file))
    if isinstance(found, list):
        answers(digest, found)


@fuzz(examples=40)
@given(edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4), cut=st.integers(0, 40))
@example(edits=[(47, 128)], cut=0)
def test_a_damaged_parquet_file(folder: Path, edits: list[tuple[int, int]], cut: int) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if not (folder / "sound.parquet").exists():
        rows = [{"text": f"The river {n}", "talk": ROWS[1]["messages"][1:], "n": n} for n in range(20)]
        parquet.write_table(arrow.Table.from_pylist(rows), folder / "sound.parquet")
    content = bytearray((folder / "sound.parquet").read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    used(written(folder / "a.parquet", bytes(content[: len(content) - cut * 7])))
