"""Headers of CTranslate2's files: what a damaged one says, and what is none."""

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.errors import Failure, RequestError
from lighten.model.ctranslate2_source import BINARY, facts_of, find_ctranslate2, read_header, read_vocabulary


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def tensor(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> bytes:
    sizes = struct.pack(f"<{len(shape)}I", *shape)
    return text(name) + struct.pack("<B", len(shape)) + sizes + struct.pack("<BI", kind, len(data)) + data


TENSORS = (
    tensor("decoder/embeddings/weight", (5, 4), 1, b"\1" * 20),
    tensor("decoder/num_heads", (), 2, struct.pack("<h", 2)),
    tensor("decoder/layer_0/ffn/linear_0/weight", (8, 4), 1, b"\1" * 32),
    tensor("decoder/layer_0/self_attention/linear_0/weight", (8, 4), 1, b"\1" * 32),
    tensor("decoder/layer_0/self_attention/num_heads_kv", (), 3, struct.pack("<i", 1)),
)
HEAD = struct.pack("<I", 6) + text("TransformerDecoderSpec") + struct.pack("<I", 8)
WHOLE = HEAD + struct.pack("<I", len(TENSORS)) + b"".join(TENSORS) + struct.pack("<I", 1)
WHOLE += text("decoder/projection/weight") + text("decoder/embeddings/weight")


def written(folder: Path, data: bytes) -> Path:
    (folder / BINARY).write_bytes(data)
    return folder


def test_a_header_gives_the_sizes(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, WHOLE))
    assert header.task == "causal"
    assert header.aliases == {"decoder/projection/weight": "decoder/embeddings/weight"}
    facts = facts_of(header, 77)
    assert (facts.layers, facts.hidden, facts.intermediate, facts.heads, facts.kv_heads) == (1, 4, 8, 2, 1)
    assert (facts.head_dim, facts.vocab, facts.tied, facts.context, facts.params) == (2, 5, True, 77, 84)


@pytest.mark.parametrize("length", [len(HEAD), len(HEAD) + 10, len(WHOLE) - 1, len(WHOLE) - 40])
def test_a_file_that_was_cut_is_said_to_be_damaged(tmp_path: Path, length: int) -> None:
    with pytest.raises(Failure, match=r"model\.bin is damaged"):
        read_header(written(tmp_path, WHOLE[:length]))


def test_a_file_without_a_tensor_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="lacks 'decoder/embeddings/weight'"):
        facts_of(read_header(written(tmp_path, HEAD + struct.pack("<II", 0, 0))))


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    folder = written(tmp_path_factory.getbasetemp(), WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :])
    with contextlib.suppress(Failure, RequestError):
        facts_of(read_header(folder))


@pytest.mark.parametrize("data", [b"", b"\x80\x02}q", b"PK\3\4" + bytes(60), struct.pack("<I", 6) + text("Other")])
def test_other_files_of_that_name_are_none(tmp_path: Path, data: bytes) -> None:
    assert find_ctranslate2(written(tmp_path, data)) is None
    assert find_ctranslate2(tmp_path / "nothing") is None


@pytest.mark.parametrize("words", ["{}", "[1, 2]", "[", "\udc00"])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, words: str) -> None:
    file = tmp_path / "vocabulary.json"
    file.write_bytes(words.encode("utf-8", "surrogatepass"))
    with pytest.raises(Failure, match=r"vocabulary\.json is damaged"):
        read_vocabulary(file)
