import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lighten.errors import LightenError
from lighten.model import gguf_header, gguf_source
from lighten.model.traffic import gguf_reads
from tests.fuzz.frame import answers, fuzz

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

Edit = tuple[int, bytes]
"""A place, and what is written over what is there."""
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


@cache
def valid() -> bytes:
    """Returns a small file that reads well, with a value of every kind."""
    import tempfile

    path = Path(tempfile.mkdtemp()) / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    shapes |= {"attn_output": (32, 32), "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (3, 32), "output_norm.weight": (32,), **tensors}.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def header_bytes() -> int:
    return valid().rindex(b"weight") + 60


@cache
def after(text: str) -> int:
    """Returns the place after a key or a tensor's name in the valid file."""
    return valid().index(struct.pack("<Q", len(text)) + text.encode()) + 8 + len(text)


def number(key: str, value: int) -> Edit:
    return after(f"llama.{key}") + 4, struct.pack("<I", value)


def extent(tensor: str, **fields: int) -> list[Edit]:
    """Writes rank, sizes, type or place of a matrix."""
    places = {"rank": (0, "<I"), "columns": (4, "<Q"), "rows": (12, "<Q"), "kind": (20, "<I"), "start": (24, "<Q")}
    return [(after(tensor) + places[name][0], struct.pack(places[name][1], value)) for name, value in fields.items()]


edits = st.lists(
    st.tuples(
        st.integers(4, 1 << 11).map(lambda place: place % header_bytes()),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from(NUMBERS).map(lambda value: struct.pack("<Q", value)),
            st.sampled_from(NUMBERS).map(lambda value: struct.pack("<I", value % 2**32)),
        ),
    ),
    min_size=1,
    max_size=4,
)


def written(folder: Path, changes: list[Edit], cut: int) -> Path:
    whole = bytearray(valid())
    for place, what in changes:
        whole[place : place + len(what)] = what
    path = folder / "model.gguf"
    path.write_bytes(bytes(whole[: len(whole) - cut]))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def test_the_file_that_is_damaged_is_sound(folder: Path) -> None:
    assert gguf_source.inspect(written(folder, [], 0)).layers == 1


@fuzz(examples=200)
@given(changes=edits, cut=st.sampled_from([0, 0, 0, 1, 4000]))
@example(changes=[(8, struct.pack("<Q", 2**64 - 1))], cut=0)
@example(changes=[(16, struct.pack("<Q", 2**64 - 1))], cut=0)
@example(changes=[number("block_count", 2**32 - 1)], cut=0)
@example(changes=[number("block_count", 100_000_000)], cut=0)
@example(changes=[number("attention.head_count", 0)], cut=0)
@example(changes=[number("attention.head_count_kv", 0)], cut=0)
@example(changes=[number("embedding_length", 0)], cut=0)
@example(changes=[number("context_length", 2**32 - 1)], cut=0)
@example(changes=extent("blk.0.ffn_up.weight", rank=2**31), cut=0)
@example(changes=extent("blk.0.ffn_up.weight", rank=0), cut=0)
@example(changes=extent("blk.0.ffn_up.weight", columns=2**63, rows=2**63), cut=0)
@example(changes=extent("blk.0.ffn_up.weight", columns=0), cut=0)
@example(changes=extent("blk.0.ffn_up.weight", rows=0), cut=0)
@example(changes=extent("blk.0.ffn_up.weight", start=2**64 - 32), cut=0)
@example(changes=extent("blk.0.ffn_up.weight", kind=2**32 - 1), cut=0)
@example(changes=extent("token_embd.weight", rank=1), cut=0)
def test_a_damaged_file_is_read_or_refused(folder: Path, changes: list[Edit], cut: int) -> None:
    path = written(folder, changes, cut)
    answers(gguf_source.inspect, path)
    answers(gguf_reads, [path])


@fuzz(examples=60)
@given(changes=edits)
def test_a_damaged_file_is_converted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, changes: list[Edit]
) -> None:
    pytest.importorskip("torch")
    answers(gguf_source.convert, written(folder, changes, 0), tmp_path_factory.mktemp("out"))


def test_values_of_every_kind_are_bounded_by_the_file(folder: Path) -> None:
    """A count that the file cannot hold is refused before anything of that size is made."""
    for item, kind in ((0, 9), (8, 9), (12, 9)):
        body = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", kind, item, 2**60)
        path = folder / "count.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + body + bytes(64))
        found: Any = answers(gguf_header.read_header, path)
        assert str(path) in str(found)


IMPOSSIBLE = [
    ([number("block_count", 2**32 - 1)], "block_count is 4294967295"),
    ([number("block_count", 5000)], "tells of 5,000 layers, but has"),
    ([number("block_count", 0)], "block_count is 0"),
    ([number("attention.head_count", 0)], "head_count is 0"),
    ([number("embedding_length", 0)], "embedding_length is 0"),
    (extent("blk.0.ffn_up.weight", rank=5), "has 5 axes"),
    (extent("blk.0.ffn_up.weight", rows=0), "impossible shape"),
    (extent("blk.0.ffn_up.weight", rows=2**40), "is cut short: tensor blk.0.ffn_up.weight"),
    (extent("blk.0.ffn_up.weight", start=2**63), "is cut short: tensor blk.0.ffn_up.weight"),
    (extent("blk.0.ffn_up.weight", kind=2, columns=31), "impossible shape"),
    ([(8, struct.pack("<Q", 2**60))], "tells of 1,152,921,504,606,846,976 entries"),
]


@pytest.mark.parametrize(("changes", "told"), IMPOSSIBLE)
def test_what_no_file_can_hold_is_refused(folder: Path, changes: list[Edit], told: str) -> None:
    path = written(folder, changes, 0)
    assert told in str(answers(gguf_source.inspect, path))


@pytest.mark.parametrize(
    ("changes", "told"), [each for each in IMPOSSIBLE if "is 0" not in each[1] or "embedding" in each[1]]
)
def test_llama_cpp_is_not_given_it(folder: Path, changes: list[Edit], told: str) -> None:
    from lighten.evaluate.runtimes.llama_binding import GgufModel

    path = written(folder, changes, 0)
    for vocab_only in (False, True):
        with pytest.raises(LightenError, match=re.escape(told)):  # before the library is looked for
            GgufModel(path, "cpu", vocab_only)


def test_a_tensor_of_another_shape_is_named(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = written(folder, extent("blk.0.attn_k.weight", rows=8), 0)
    told = str(answers(gguf_source.convert, path, tmp_path))
    assert "tensor blk.0.attn_k.weight is [8, 32], its sizes say [16, 32]" in told
