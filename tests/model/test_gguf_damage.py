"""GGUF files that are damaged, are no models, or are of kinds that lighten does not know."""

import struct
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.errors import Failure, LightenError, RequestError
from lighten.evaluate.runtimes.choose import find_opener
from lighten.model import gguf_header, gguf_source
from lighten.model.formats import recognise
from lighten.model.source import find
from tests.model.gguf_files import VOCAB, Make, converted, make, renamed

__all__ = ["make"]


def test_every_truncation_is_named(make: Make) -> None:
    path = make()
    whole = path.read_bytes()
    header = gguf_header.read_header(path)
    last = max(header.tensors.values(), key=lambda tensor: tensor.start)
    path.write_bytes(whole[: last.start + last.size - 1])
    expected = (
        rf"is cut short: tensor {last.name} needs bytes up to {last.start + last.size}, .* {last.start + last.size - 1}"
    )
    with pytest.raises(Failure, match=f"{expected}; fetch it again"):
        gguf_source.check(path)
    for size in (4, 9, 20, 24, 100, 3000, len(whole) // 4):
        path.write_bytes(whole[:size])
        with pytest.raises(Failure, match=f"is cut short: .*the file has {size}; fetch it again"):
            gguf_source.check(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damage_never_shows_a_traceback(data: st.DataObject) -> None:
    whole = bytearray(damaged_source())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, 1500))] = data.draw(st.integers(0, 255))
    path = damaged_path().with_name("damaged.gguf")
    path.write_bytes(whole)
    try:
        gguf_source.inspect(path)
    except LightenError as error:
        assert str(path) in str(error)


@cache
def damaged_path() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp()) / "m.gguf"


@cache
def damaged_source() -> bytes:
    writer = gguf.GGUFWriter(damaged_path(), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b", "c"])
    for index in range(20):
        writer.add_tensor(f"blk.{index}.attn_q.weight", np.zeros((2, 32), np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return damaged_path().read_bytes()


def test_not_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        gguf_source.check(tmp_path / "none.gguf")
    with pytest.raises(RequestError, match="no such file"):
        gguf_source.check(tmp_path)
    for content in (b"", b"GG", b"PK\x03\x04 not this"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(RequestError, match="not a GGUF file"):
            gguf_source.check(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(RequestError, match="version 1 or big-endian"):
        gguf_source.check(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope_dimension_count": 8}, "rotates only a part"),
        ({"head_count_kv": [2, 1]}, "differs from layer to layer"),
    ],
)
def test_unsupported_models(make: Make, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gguf_source.inspect(make(keys=keys))


def test_unsupported_architecture(make: Make) -> None:
    with pytest.raises(
        RequestError, match=r"'falcon', which can be measured but not changed.*llama, qwen2, qwen3, .*Mistral"
    ):
        gguf_source.check(renamed(make(), "falcon"))


def test_unknown_tokenizers(make: Make) -> None:
    with pytest.raises(RequestError, match="'mystery', which lighten does not know; known: gpt-2, smollm"):
        converted(make(pre="mystery"))
    with pytest.raises(RequestError, match="model 'bert'; lighten reads gpt2, llama and gemma4"):
        converted(make(name="b.gguf", keys={"tokenizer_model": "bert"}), "bert")


def test_unknown_tensors(make: Make) -> None:
    def add(held: dict[str, np.ndarray[Any, Any]]) -> None:
        held["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)

    with pytest.raises(RequestError, match=r"has no tensor blk\.0\.attn_q_norm\.weight"):
        converted(make(change=add))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_named(make: Make, value: float) -> None:
    def spoil(held: dict[str, np.ndarray[Any, Any]]) -> None:
        held["blk.1.ffn_up.weight"][2, 3] = value

    with pytest.raises(Failure, match=r"tensor blk\.1\.ffn_up\.weight holds NaN or infinity"):
        converted(make(quantized="F32", change=spoil))


def test_without_the_gguf_package(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match=r"pip install 'lighten\[gguf\]'"):
        gguf_source.check(path)


def no_model(folder: Path, kind: str, **keys: str) -> Path:
    writer = gguf.GGUFWriter(folder / kind, "llama" if kind != "imatrix" else kind)
    writer.add_type(kind)
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / kind


def test_files_that_are_no_models_are_told_by_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"adapter is an adapter of a model of the kind llama: merge it"):
        gguf_source.measurable(no_model(tmp_path, "adapter"))
    named = no_model(tmp_path, "adapter", general__base_model__0__repo_url="https://huggingface.co/org/base")
    with pytest.raises(RequestError, match=r"an adapter of https://huggingface.co/org/base"):
        find(str(named))
    with pytest.raises(RequestError, match=r"an importance matrix, and no model"):
        find(str(no_model(tmp_path, "imatrix")))
    vocabulary = gguf.GGUFWriter(tmp_path / "words.gguf", "llama")
    vocabulary.write_header_to_file()
    vocabulary.write_kv_data_to_file()
    vocabulary.close()
    with pytest.raises(RequestError, match="no weights, only a vocabulary"):
        find(str(tmp_path / "words.gguf"))


def test_a_file_is_recognised_by_its_content(make: Make, tmp_path: Path) -> None:
    file = make(name="sha256-abab")
    (tmp_path / "text").write_text("GGU")
    assert gguf_header.is_gguf(file) and not gguf_header.is_gguf(tmp_path / "text")
    assert not gguf_header.is_gguf(tmp_path)
    assert find(str(file)).form == "gguf"
    assert find_opener(file)[1] == file
    assert recognise(file) == (file, "gguf", None)


def test_a_file_without_a_pre_tokenizer_is_measured_with_a_warning_and_not_converted(make: Make) -> None:
    assert gguf_source.doubts(make()) == []
    path = make(pre="")
    assert "does not name its pre-tokenizer" in gguf_source.doubts(path)[0]
    assert gguf_source.measurable(path).vocab == VOCAB
    with pytest.raises(RequestError, match="does not name its pre-tokenizer"):
        gguf_source.check(path)


def test_sizes_of_any_architecture_are_told_for_measuring(make: Make) -> None:
    known = make()
    assert replace(gguf_source.measurable(known), counted=None) == gguf_source.inspect(known)
    foreign = gguf_source.measurable(renamed(known, "falcon"))
    assert foreign.architecture == "falcon"
    assert foreign.counted == gguf_source.inspect(make(name="again.gguf")).params
