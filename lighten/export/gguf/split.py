"""A GGUF file cut into parts, in the form of llama.cpp's gguf-split. llama.cpp opens the first and finds the rest."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from lighten.errors import RequestError
from lighten.model.gguf_header import Tensor, read_header
from lighten.step import Report, silent

_ALIGNMENT = 32
_UINT16, _INT32 = 2, 5


def part_name(stem: str, number: int, count: int) -> str:
    """Returns llama.cpp's name of a part, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def split(file: Path, limit: int, report: Report = silent) -> list[Path]:
    """Cuts a file that is larger than `limit` bytes into parts of at most `limit` bytes, and removes the file.

    A tensor is never cut. If one tensor is larger than the limit, its part is larger too.

    Args:
        file: the whole file.
        limit: bytes of a part.
        report: called for every written tensor.

    Returns:
        The parts; the file itself if it is small enough.

    Raises:
        RequestError: the limit does not even hold the metadata.
    """
    if file.stat().st_size <= limit:
        return [file]
    header = read_header(file)
    tensors = sorted(header.tensors.values(), key=lambda tensor: tensor.start)
    with file.open("rb") as source:
        source.seek(24)
        fields, count = source.read(header.fields_end - 24), len(header.fields)
        parts = _share_out(tensors, limit, len(fields))
        names = [file.with_name(part_name(file.stem, number, len(parts))) for number in range(1, len(parts) + 1)]
        partial = [name.with_name(f".{name.name}.partial") for name in names]
        done = 0
        try:
            for number, (path, part) in enumerate(zip(partial, parts, strict=True)):
                keys = _split_keys(number, len(parts), len(tensors))
                with path.open("wb") as out:
                    own = (fields, count) if number == 0 else (b"", 0)
                    _write_part(source, out, part, own[0] + keys, own[1] + 3)
                done += len(part)
                report(done, len(tensors), path.name)
            for path, name in zip(partial, names, strict=True):
                os.replace(path, name)
        finally:
            for path in partial:
                path.unlink(missing_ok=True)
    file.unlink()
    return names


def _entry(tensor: Tensor, offset: int) -> bytes:
    name, shape = tensor.name.encode(), tensor.shape[::-1]
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", tensor.type, offset)


def _share_out(tensors: list[Tensor], limit: int, metadata: int) -> list[list[Tensor]]:
    """Returns the tensors of every part."""
    parts: list[list[Tensor]] = [[]]
    room = limit - metadata - 256
    if room <= 0:
        raise RequestError(f"split is {limit:,} bytes, and the metadata alone takes {metadata:,}: set more")
    for tensor in tensors:
        size = tensor.size + -tensor.size % _ALIGNMENT + len(_entry(tensor, 0))
        if parts[-1] and size > room:
            parts.append([])
            room = limit - 256
        parts[-1].append(tensor)
        room -= size
    return parts


def _split_keys(number: int, count: int, tensors: int) -> bytes:
    keys = (("split.no", _UINT16, "H", number), ("split.count", _UINT16, "H", count))
    packed = b"".join(_key(name) + struct.pack(f"<I{code}", kind, value) for name, kind, code, value in keys)
    return packed + _key("split.tensors.count") + struct.pack("<Ii", _INT32, tensors)


def _key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def _write_part(source: BinaryIO, out: BinaryIO, tensors: list[Tensor], fields: bytes, count: int) -> None:
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + fields)
    offset = 0
    for tensor in tensors:
        out.write(_entry(tensor, offset))
        offset += tensor.size + -tensor.size % _ALIGNMENT
    for tensor in tensors:
        out.write(b"\0" * (-out.tell() % _ALIGNMENT))
        source.seek(tensor.start)
        _copy(source, out, tensor.size)
    out.write(b"\0" * (-out.tell() % _ALIGNMENT))


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(size, 1 << 24))
        if not chunk:
            raise OSError("the file ends before its last tensor")
        out.write(chunk)
        size -= len(chunk)
