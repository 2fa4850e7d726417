"""Writing safetensors one tensor at a time, so that the whole model is never in memory.

The format has its JSON header before the data, and allows spaces after the JSON. Room for the header is set aside by
the announced number of tensors. The header is filled in when the shard is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch

from lighten.model.checkpoint import INDEX, SINGLE

_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint32: "U32",
    torch.float8_e4m3fn: "F8_E4M3",
}
_HEADER_BYTES_PER_TENSOR = 160


class ShardWriter:
    """Writes tensors, in the given order, into shards of at most `shard_bytes` and an index.

    Use it as a context manager. The files get their final names if the block ends without an error.
    """

    def __init__(self, folder: Path, tensors: int, shard_bytes: int = 4_000_000_000, *, library: str = "pt") -> None:
        """Opens a writer for at most about `tensors` tensors in `folder`; `library` is what loads them."""
        self.folder = folder
        self.library = library
        self.shard_bytes = shard_bytes
        self._room = 1024 + _HEADER_BYTES_PER_TENSOR * tensors
        self._room += -self._room % 8
        self._shards: list[dict[str, dict[str, object]]] = []
        self._file: BinaryIO | None = None
        self._offset = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends one tensor (moved to the CPU if it is elsewhere)."""
        size = tensor.numel() * tensor.element_size()
        if self._file is None or (self._offset and self._offset + size > self.shard_bytes):
            self._start_shard()
        assert self._file is not None
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)
        self._shards[-1][name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + size],
        }
        self._offset += size

    def _path(self, number: int) -> Path:
        return self.folder / f".shard-{number:05d}"

    def _start_shard(self) -> None:
        self._end_shard()
        self._shards.append({})
        self._offset = 0
        self._file = self._path(len(self._shards)).open("wb")
        self._file.write(b"\0" * (8 + self._room))

    def _end_shard(self) -> None:
        if self._file is None:
            return
        metadata = {"__metadata__": {"format": self.library}}
        header = json.dumps({**metadata, **self._shards[-1]}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"{len(self._shards[-1])} tensors need {len(header)} header bytes, {self._room} set aside")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            if self._file:
                self._file.close()
            return
        self._end_shard()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        for number, name in enumerate(names, 1):
            self._path(number).rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            total = sum(max(entry["data_offsets"][1] for entry in shard.values()) for shard in self._shards)  # type: ignore[index]
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
