import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lighten.model.checkpoint import INDEX, Checkpoint
from lighten.model.traffic import traffic
from tests.fuzz.frame import answers, fuzz

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 4,
    "tie_word_embeddings": True,
}
HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    "model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [128, 160]},
}
FILE = "model-00001-of-00001.safetensors"

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 1e300])
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["../x.safetensors", "/etc/passwd", FILE, "", "..", "x\0"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def changed(made: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns nested objects with other values; keys are paths with blanks."""
    made = json.loads(json.dumps(made))
    for where, value in changes.items():
        *path, last = where.split(" ")
        there = made
        for key in path:
            there = there[key] if isinstance(there.get(key), dict) else there.setdefault(key, {}) or there[key]
            if not isinstance(there, dict):
                break
        else:
            there[last] = value
    return made


def places(made: Any, path: str = "") -> list[str]:
    if not isinstance(made, dict):
        return [path]
    return [path, *(each for key, inner in made.items() for each in places(inner, f"{path} {key}".strip()))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def write(folder: Path, config: bytes, index: bytes, header: bytes, length: int | None = None) -> Path:
    (folder / "config.json").write_bytes(config)
    (folder / INDEX).write_bytes(index)
    (folder / FILE).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(160))
    return folder


def spelled(made: Any) -> bytes:
    return json.dumps(made).encode()


def index_of(header: dict[str, Any] = HEADER) -> dict[str, Any]:
    return {"metadata": {"total_size": 160}, "weight_map": dict.fromkeys(list(header)[1:], FILE)}


def read(path: Path) -> Any:
    checkpoint = Checkpoint(path)
    names, shapes = checkpoint.weight_map, checkpoint.shapes()
    assert all((path / name).resolve().parent == path.resolve() for name in names.values())
    return checkpoint.facts, shapes, checkpoint.count(), checkpoint.quantization


def test_the_checkpoint_that_is_damaged_is_sound(folder: Path) -> None:
    found = answers(read, write(folder, spelled(CONFIG), spelled(index_of()), spelled(HEADER)))
    assert found[2] == 40


@fuzz(examples=80)
@given(changes=st.dictionaries(st.sampled_from(places(index_of())[1:]), values, min_size=1, max_size=2))
@example(changes={"weight_map": None})
@example(changes={"weight_map": [FILE]})
@example(changes={"weight_map model.norm.weight": {"a": 1}})
@example(changes={"weight_map model.norm.weight": "../x.safetensors"})
@example(changes={"weight_map model.norm.weight": "none.safetensors"})
def test_an_index(folder: Path, changes: dict[str, Any]) -> None:
    answers(read, write(folder, spelled(CONFIG), spelled(changed(index_of(), changes)), spelled(HEADER)))


@fuzz(examples=80)
@given(
    changes=st.dictionaries(st.sampled_from(places(HEADER)[1:]), values, min_size=1, max_size=2),
    length=st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]),
)
@example(changes={"model.norm.weight shape": [2**62, 2**62]}, length=None)
@example(changes={"model.norm.weight data_offsets": [0, 2**63]}, length=None)
@example(changes={"model.norm.weight dtype": "F4"}, length=None)
def test_a_header(folder: Path, changes: dict[str, Any], length: int | None) -> None:
    header = spelled(changed(HEADER, changes))
    path = write(folder, spelled(CONFIG), spelled(index_of()), header, length)
    answers(read, path)
    answers(lambda: traffic(path, Checkpoint(path).facts, "float32"))


@fuzz(examples=80)
@given(changes=st.dictionaries(st.sampled_from([*CONFIG, "quantization_config", "head_dim"]), values, min_size=1))
def test_a_config(folder: Path, changes: dict[str, Any]) -> None:
    config = spelled({**CONFIG, **changes})
    answers(read, write(folder, config, spelled(index_of()), spelled(HEADER)))


@fuzz(examples=60)
@given(
    which=st.sampled_from([0, 1, 2]),
    text=st.binary(max_size=20) | st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b'{"a":1,"a":2}', b"9" * 9_999]),
)
def test_bytes_of_any_kind(folder: Path, which: int, text: bytes) -> None:
    files = [spelled(CONFIG), spelled(index_of()), spelled(HEADER)]
    files[which] = text
    path = write(folder, *files)
    answers(read, path)
    answers(lambda: traffic(path, Checkpoint(path).facts, "float32"))
