"""What a CTranslate2 directory says about itself, without its weights.

`model.bin` has a version, the name of a specification and its revision, and then name, shape, type and bytes of every
tensor.
Written after ctranslate2/specs/model_spec.py of CTranslate2 4.8, whose files are of version 6.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

from lighten.errors import Failure, RequestError
from lighten.facts import ModelFacts, Task
from lighten.model.files import read_json, refuse_pointer

BINARY = "model.bin"
COMPUTE_TYPE = "compute_type"
"""Key of config.json that names the type of the products, where it is another than that of the weights."""
_VERSIONS = range(1, 7)
_FLOATS = ("float32", "float16", "bfloat16")
_COMPUTE_TYPES = ("default", "auto", *_FLOATS, "int16", "int8", *(f"int8_{each}" for each in _FLOATS))
_TASKS: dict[str, Task] = {"TransformerDecoderSpec": "causal", "TransformerSpec": "seq2seq"}
"""Specifications that can be measured here."""
_INTEGERS = {1: "<b", 2: "<h", 3: "<i"}
"""How numbers of its types are stored: int8, int16, int32."""
_LAYER = re.compile(r"(?:decoder|encoder)/layer_(\d+)/")
_WEIGHTS = ("weight", "bias", "gamma", "beta", "encodings")
_LARGEST_NAME, _MOST, _LARGEST_VOCABULARY = 1000, 1_000_000, 1 << 28
_DAMAGED = "{} is damaged ({}): convert the model again"


@dataclass(frozen=True)
class Header:
    """The tensors of a file."""

    specification: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    """Values of the tensors that are a single integer."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names that stand for other tensors."""

    @property
    def task(self) -> Task:
        """The task of its model; "other" for what cannot be measured here."""
        return _TASKS.get(self.specification, "other")


def find_ctranslate2(path: Path) -> Path | None:
    """Returns the directory of a model of CTranslate2: a path that holds one, or is its `model.bin`; else None."""
    folder = path if path.is_dir() else path.parent if path.name == BINARY else None
    if folder is None or not (folder / BINARY).is_file():
        return None
    with (folder / BINARY).open("rb") as file:
        try:
            version, name = _begin(file)
        except (ValueError, struct.error):
            return None
    return folder if version in _VERSIONS and name.endswith("Spec") else None


def read_header(folder: Path) -> Header:
    """Returns what `model.bin` says of its tensors.

    Raises:
        RequestError: the file is a pointer of Git.
        Failure: it is damaged.
    """
    path = folder / BINARY
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except (OSError, ValueError, struct.error) as error:
        raise Failure(_DAMAGED.format(path, error)) from error


def read_vocabulary(file: Path) -> list[str]:
    """Returns the tokens of a vocabulary in the order of their ids.

    Raises:
        Failure: it is no list of texts, or too large to be one.
    """
    try:
        if file.stat().st_size > _LARGEST_VOCABULARY:
            raise ValueError("too large to be a vocabulary")
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(_DAMAGED.format(file, error)) from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Failure(_DAMAGED.format(file, "it holds no list of tokens"))
    return found


def compute_type_of(folder: Path) -> str:
    """Returns the type that the products of a model are computed in; "default" is that of its weights.

    Raises:
        RequestError: config.json names a type that CTranslate2 does not have.
    """
    file = folder / "config.json"
    told = read_json(file).get(COMPUTE_TYPE, "default") if file.is_file() else "default"
    if told not in _COMPUTE_TYPES:
        raise RequestError(f"{file} names the {COMPUTE_TYPE} {told!r}: it is one of {', '.join(_COMPUTE_TYPES)}")
    return str(told)


def facts_of(header: Header, context: int | None = None) -> ModelFacts:
    """Returns the sizes of a model from the shapes of its tensors.

    Raises:
        Failure: a tensor is missing.
    """
    shapes, first = header.shapes, "decoder/layer_0"
    try:
        vocab, hidden = shapes["decoder/embeddings/weight"]
        wide = shapes[f"{first}/ffn/linear_0/weight"][0]
        rows = shapes[f"{first}/self_attention/linear_0/weight"][0]
        heads = header.numbers["decoder/num_heads"]
        shared = header.numbers.get(f"{first}/self_attention/num_heads_kv") or heads
        head_dim = rows // (heads + 2 * shared)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise Failure(f"{BINARY} of {header.specification} lacks {error}: it cannot be measured here") from error
    weights = {name: prod(shape) for name, shape in shapes.items() if name.rpartition("/")[2] in _WEIGHTS}
    return ModelFacts(
        architecture=header.specification,
        layers=len({found[0] for name in shapes if (found := _LAYER.match(name))}),
        hidden=hidden,
        intermediate=wide,
        heads=heads,
        kv_heads=shared,
        head_dim=head_dim,
        vocab=vocab,
        tied="decoder/projection/weight" not in shapes,
        task=header.task,
        counted=sum(weights.values()),
        context=context,
    )


def _begin(file: BinaryIO) -> tuple[int, str]:
    (version,) = struct.unpack("<I", file.read(4))
    return version, _text(file)


def _read(file: BinaryIO, size: int) -> Header:
    version, name = _begin(file)
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}")
    header = Header(name)
    _, count = struct.unpack("<II", file.read(8))
    if count > _MOST:
        raise ValueError(f"it says that it has {count:,} tensors")
    for _ in range(count):
        name = _text(file)
        (rank,) = struct.unpack("<B", file.read(1))
        header.shapes[name] = struct.unpack(f"<{rank}I", file.read(4 * rank))
        kind, length = struct.unpack("<BI", file.read(5))
        if file.tell() + length > size:
            raise ValueError(f"it ends within {name}")
        if rank == 0 and kind in _INTEGERS:
            (header.numbers[name],) = struct.unpack(_INTEGERS[kind], file.read(length))
        else:
            file.seek(length, os.SEEK_CUR)
    rest = file.read(4)
    (count,) = struct.unpack("<I", rest) if rest else (0,)
    for _ in range(min(count, _MOST)):
        alias = _text(file)
        header.aliases[alias] = _text(file)
    return header


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<H", file.read(2))
    if not 0 < length <= _LARGEST_NAME:
        raise ValueError(f"a name has {length} bytes")
    found = file.read(length)
    if len(found) < length or found[-1]:
        raise ValueError("a name does not end")
    return found[:-1].decode()
