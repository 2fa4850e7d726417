import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lighten.model.onnx_source import facts, genai, read_graph
from lighten.model.traffic import traffic
from tests.fuzz.frame import answers, fuzz
from tests.model.test_onnx_checks import builders, graph

onnx = pytest.importorskip("onnx")

names = st.one_of(
    st.sampled_from(["w.data", "../w.data", "/etc/passwd", "", ".", "..", "w.data/", "*/_ORT_MEM_ADDR_/*", "a\0b"]),
    st.text(max_size=8),
)
numbers = st.one_of(st.integers(-(2**70), 2**70).map(str), st.sampled_from(["", "0", "64", "1e3", "0x10"]), st.text())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("evil.so"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@fuzz(examples=60)
@given(location=names, offset=numbers, length=numbers, inner=st.booleans())
def test_external_data(folder: Path, location: str, offset: str, length: str, inner: bool) -> None:
    found = answers(read_graph, graph(folder, inner=inner, location=location, offset=offset, length=length))
    if not isinstance(found, Exception):
        assert (folder / location).resolve().parent == folder.resolve()
        assert int(offset) + max(int(length), 1) <= 64


@fuzz(examples=150)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5), cut=st.integers(0, 9)
)
@example(edits=[(0, 0)], cut=0)
def test_a_damaged_graph_is_read_or_refused(folder: Path, edits: list[tuple[int, int]], cut: int) -> None:
    path = graph(folder, location="w.data")
    whole = bytearray(path.read_bytes())
    for place, byte in edits:
        whole[place % len(whole)] = byte
    path.write_bytes(whole[: len(whole) - cut])
    answers(read_graph, path)


def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [path, *(found for key, each in value.items() for found in paths(each, (*path, key)))]


@fuzz(examples=150)
@given(where=st.sampled_from(paths(builders())[1:]), value=values, text=st.just("") | st.text(max_size=3))
def test_settings_of_genai(folder: Path, where: tuple[str, ...], value: Any, text: str) -> None:
    made: Any = builders()
    there = made
    for key in where[:-1]:
        there = there[key]
    there[where[-1]] = value
    (folder / "genai_config.json").write_text(json.dumps(made)[len(text) :] + text)
    path = graph(folder, location="w.data")
    answers(genai, folder)
    found = answers(facts, path)
    if not isinstance(found, Exception):
        answers(traffic, folder, found, "float32")
