"""The header of a GGUF file: its keys, and the place of each tensor."""

from __future__ import annotations

import math
import mmap
import re
import runpy
import struct
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError, missing_extra

MOST_VALUES, MOST_TEXT, MOST_AXES = 1 << 24, 1 << 26, 4
"""Values in all arrays of a header together, bytes of a text, and axes of a tensor (ggml's own limit): no model has
more, and what a header asks for is made in memory."""


MODELFILE = "Modelfile"
"""Name of the file for Ollama beside a GGUF file."""
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


_STRING, _ARRAY = 8, 9


_FIELD_BYTES, _TENSOR_BYTES = 13, 32
"""The least that a field and the entry of a tensor take."""


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor. `shape` is `[out, in]` as in Hugging Face; `start` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int
    file: Path | None = None
    """Part that it lies in, for a file in parts."""


@dataclass(frozen=True)
class Header:
    """Metadata and tensor list of a GGUF file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    fields_end: int = 0
    """Number of the byte after the metadata, which begins at byte 24."""

    @property
    def arch(self) -> str:
        """Name of the architecture, which is also the prefix of its keys."""
        return str(self.fields.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number of the architecture, such as `attention.head_count`."""
        value = self.fields.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if value is None:
            raise Failure(f"{self.path} has no {self.arch}.{key}: a damaged file; fetch it again")
        if isinstance(value, list) and value:
            raise RequestError(f"{self.path}: {key} differs from layer to layer, which lighten does not read")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Failure(f"{self.path}: {self.arch}.{key} is {str(value)[:40]!r}, no number: damaged; fetch it again")
        return float(value)

    def decimal(self, key: str, default: float | None = None) -> float:
        """Returns the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
        import numpy as np

        return float(str(np.float32(self.number(key, default))))

    def largest(self, key: str) -> int:
        """Returns a whole number of the architecture: the largest if it differs by layer, 0 if there is none."""
        value = self.fields.get(f"{self.arch}.{key}", 0)
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]
        return int(max(numbers, default=0))

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a whole number of the architecture."""
        return int(self.number(key, default))

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a whole number of the architecture that must be at least 1."""
        found = self.integer(key, default)
        if not 0 < found < 1 << 31:
            raise Failure(f"{self.path}: {self.arch}.{key} is {found}: damaged; fetch it again")
        return found

    def count(self, key: str, default: int) -> int:
        """Returns a whole number that belongs to the whole file, whatever its architecture."""
        found = self.fields.get(key, default)
        if not isinstance(found, int):
            raise Failure(f"{self.path}: {key} is {str(found)[:40]!r}, no number: damaged; fetch it again")
        return found


class _Cursor:
    """Reads the header. Running past the end of the file is a Failure."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.values = path, data, 0, 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise Failure(
                f"{self.path} is cut short: its header needs bytes up to {end}, the file has {len(self.data)}; "
                "fetch it again"
            )
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def holds(self, count: int, size: int) -> None:
        """Refuses a number of things, of at least `size` bytes each, that the rest of the file cannot hold."""
        if self.at + count * size > len(self.data):
            raise Failure(
                f"{self.path} is cut short: its header tells of {count:,} entries at byte {self.at:,}, "
                f"the file has {len(self.data)}; fetch it again"
            )

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        if size > MOST_TEXT and self.at + size <= len(self.data):
            raise Failure(f"{self.path}: a text of {size:,} bytes in its header: damaged; fetch it again")
        return self.take(size).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise Failure(f"{self.path}: metadata of unknown type {kind} at byte {self.at}: damaged; fetch it again")
        item, count = self.scalar("I"), self.scalar("Q")
        if item not in _SCALARS and item != _STRING:
            raise Failure(f"{self.path}: an array of type {item} at byte {self.at}: damaged; fetch it again")
        size = struct.calcsize("<" + _SCALARS.get(item, "Q"))
        self.holds(count, size)
        self.values += count
        if self.values > MOST_VALUES:
            raise Failure(f"{self.path}: its header has arrays of {self.values:,} values: damaged; fetch it again")
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
        return [self.string() for _ in range(count)]


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Returns weights and bytes of a block of every tensor type, by its number, as the package gguf lists them.

    Only the package's file of constants is run. The package itself imports much that a measured process should not
    hold.
    """
    try:
        found = find_spec("gguf")
    except ValueError:  # what stands under its name is no package
        found = None
    if found is None or not found.submodule_search_locations:
        raise missing_extra("gguf", "gguf", "reading a .gguf file")
    return _sizes_in(Path(found.submodule_search_locations[0]) / "constants.py")


@cache
def _sizes_in(file: Path) -> dict[int, tuple[int, int]]:
    constants = runpy.run_path(str(file), run_name="gguf_constants")
    return {int(kind): sizes for kind, sizes in constants["GGML_QUANT_SIZES"].items()}


def read_header(path: Path) -> Header:
    """Reads the header of a GGUF file and checks that all its tensors lie within the file.

    Raises:
        RequestError: the file does not exist, is not GGUF, or its version, byte order or tensor type is not read.
        Failure: the file is cut short or damaged.
    """
    sizes = _block_sizes()
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RequestError(f"{path} is not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data, sizes)
            except (ValueError, TypeError, OverflowError, struct.error) as error:
                raise Failure(f"{path} has a damaged header ({error}); fetch it again") from error


def _parse(path: Path, data: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> Header:
    cursor = _Cursor(path, data)
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise RequestError(f"{path} is GGUF version {version} or big-endian; lighten reads versions 2 and 3")
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.holds(field_count, _FIELD_BYTES)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise Failure(f"{path} has {key[:80]!r} twice in its header: damaged; fetch it again")
        fields[key] = cursor.value(cursor.scalar("I"))
    fields_end = cursor.at
    cursor.holds(tensor_count, _TENSOR_BYTES)
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, rank = cursor.string(), cursor.scalar("I")
        if not 1 <= rank <= MOST_AXES or name in entries:
            what = "is there twice" if name in entries else f"has {rank} axes"
            raise Failure(f"{path}: tensor {name[:80]} {what}: damaged; fetch it again")
        shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
        entries[name] = (shape[::-1], cursor.scalar("I"), cursor.scalar("Q"))
    alignment = int(fields.get("general.alignment", 32))
    if alignment < 1 or alignment & (alignment - 1):
        raise Failure(f"{path} aligns its tensors by {alignment} bytes: damaged; fetch it again")
    return Header(
        path, fields, _lay_out(path, entries, cursor.at + -cursor.at % alignment, len(data), sizes), fields_end
    )


def _lay_out(
    path: Path,
    entries: dict[str, tuple[tuple[int, ...], int, int]],
    start: int,
    length: int,
    sizes: dict[int, tuple[int, int]],
) -> dict[str, Tensor]:
    """Returns tensors by name from shape, type and place after `start`; each lies in a file of `length` bytes."""
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        if kind not in sizes:
            raise RequestError(f"{path}: tensor {name} has type {kind}, which the installed gguf package does not know")
        block, block_bytes = sizes[kind]
        if 0 in shape or shape[-1] % block:
            raise Failure(f"{path}: tensor {name} has the impossible shape {list(shape)}: damaged; fetch it again")
        tensors[name] = Tensor(name, shape, kind, start + offset, math.prod(shape) // block * block_bytes)
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start + tensor.size > length:
            raise Failure(
                f"{path} is cut short: tensor {tensor.name} needs bytes up to {tensor.start + tensor.size}, "
                f"the file has {length}; fetch it again"
            )
    if sum(tensor.size for tensor in tensors.values()) > length:
        raise Failure(f"{path}: its tensors lie over each other: damaged; fetch it again")
    return tensors


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, by its first bytes.

    Other tools keep such files under names without a suffix. A file that only has the suffix passes here, and gets a
    clear message later.
    """
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def check_header(path: Path) -> None:
    """Checks that a GGUF file of any architecture holds what its header claims, because llama.cpp trusts a file.

    Raises:
        RequestError, Failure: as `read_header`, for any of its parts; or sizes that no such model can have.
    """
    headers = [read_header(part) for part in parts(path)]
    first, tensors = headers[0], sum(len(header.tensors) for header in headers)
    for key, least in (("block_count", 0), ("embedding_length", 1), ("attention.head_count", 0)):
        value = first.fields.get(f"{first.arch}.{key}", 1)
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and least <= each < 1 << 31 for each in numbers):
            raise Failure(f"{path}: {first.arch}.{key} is {str(value)[:40]}: damaged; fetch it again")
        if key == "block_count" and tensors and max(numbers, default=0) > tensors:
            raise Failure(f"{path} tells of {max(numbers):,} layers, but has {tensors} tensors: fetch it again")


def within(folder: Path) -> Path | None:
    """Returns the .gguf file in a directory without other weights; of a model in parts, the first one.

    Raises:
        RequestError: the directory holds several models.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1 and len(parts(found[0])) != len(found):
        names = ", ".join(file.name for file in found)
        raise RequestError(f"{folder} holds {len(found)} .gguf files ({names}): name the one to take")
    return found[0] if found else None  # llama.cpp opens the other parts itself


def parts(path: Path) -> list[Path]:
    """Returns the files of a model in parts, by the name of the first; else the file alone.

    Raises:
        RequestError: the file is a part other than the first.
        Failure: a part is missing.
    """
    found = _PART.fullmatch(path.name)
    if not found:
        return [path]
    stem, number, count = found[1], int(found[2]), int(found[3])
    names = [path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if number != 1:
        raise RequestError(f"{path} is part {number} of {count}: give the first one, {names[0].name}")
    if missing := [name.name for name in names if not name.is_file()]:
        raise Failure(f"{path} is one of {count} parts, and {missing[0]} is missing; fetch it")
    return names


def with_modelfile(path: Path) -> list[Path]:
    """Returns the parts of a file, and the Modelfile beside it if there is one."""
    beside = path.with_name(MODELFILE)
    return [*parts(path), *([beside] if beside.is_file() else [])]


def _joined(header: Header) -> Header:
    """Returns a header with the tensors of all parts."""
    count = header.count("split.count", 1)
    if count <= 1:
        return header
    files = parts(header.path)
    if len(files) != count:
        raise RequestError(
            f"{header.path} is one of {count} parts, and is not named like one (NAME-00001-of-{count:05d}.gguf)"
        )
    tensors = {name: replace(tensor, file=file) for file in files for name, tensor in read_header(file).tensors.items()}
    if len(tensors) != header.count("split.tensors.count", len(tensors)):
        raise Failure(f"{header.path}: the parts hold {len(tensors)} tensors, which is not what the first one says")
    return replace(header, tensors=tensors)


_NO_MODELS = {
    "adapter": "an adapter of {base}: merge it into that model, and give the model",
    "imatrix": "an importance matrix, and no model: lighten measures its own (imatrix: true)",
    "mmproj": "the projector of a model that sees: give the file of the language model",
}
"""Names of the types of GGUF files that are no model."""


def open_any(path: Path) -> Header:
    """Returns the header of a file that is a model of any architecture.

    Raises:
        RequestError: the file does not exist, is not GGUF, or is no model.
        Failure: the file is cut short or damaged.
    """
    header = read_header(path)
    if header.count("split.no", 0):
        parts(path)
    kind = str(header.fields.get("general.type", "model"))
    kind = {"imatrix": "imatrix", "clip": "mmproj"}.get(header.arch, kind)
    if kind in _NO_MODELS:
        base = next(
            (header.fields[key] for key in _BASES if header.fields.get(key)), f"a model of the kind {header.arch}"
        )
        raise RequestError(f"{path} is {_NO_MODELS[kind].format(base=base)}")
    return _joined(header)


_BASES = ("general.base_model.0.repo_url", "general.base_model.0.name", "general.basename")
"""Keys in which a file names the model that it was made for."""
