"""The library of llama.cpp for the runtime: its log, a model, a batch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.errors import Failure
from lighten.evaluate.runtimes.runtime import Ids
from lighten.model import accelerator
from lighten.model.gguf_header import check_header
from lighten.model.llama_library import Library, load

ERROR, CONTINUED = 4, 5
"""llama.cpp's numbers of the levels of its messages."""


def load_llama() -> Library:
    """Loads llama.cpp; see `load` for what it raises."""
    return load("running a GGUF file")


class ErrorLog:
    """The errors that llama.cpp reports. All other messages are dropped."""

    def __init__(self, library: Any) -> None:
        self._lines: list[str] = []
        self._level = 0
        self._library = library
        self._callback = library.llama_log_callback(self._write)

    def listen(self) -> None:
        """Takes llama.cpp's messages from now on, and drops the earlier ones."""
        self._lines.clear()
        self._library.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _data: Any) -> None:
        self._level = self._level if level == CONTINUED else level
        if self._level == ERROR:
            self._lines.append(text.decode(errors="replace"))

    def take(self) -> str:
        """Returns the errors since the last call, in one line."""
        text = " ".join("".join(self._lines).split())
        self._lines.clear()
        return text or "it gives no reason"


@cache
def error_log() -> ErrorLog:
    """Returns the log of the process. llama.cpp has one log for all its models, and it must outlive them."""
    return ErrorLog(load_llama().api)


class GgufModel:
    """A loaded GGUF file: its weights, or its vocabulary only."""

    def __init__(self, path: Path, device: str, vocab_only: bool) -> None:
        """Loads the file. Raises Failure if llama.cpp cannot."""
        check_header(path)
        loaded = load_llama()
        self.library = library = loaded.api
        error_log().listen()
        params = library.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = loaded.repacks
        params.n_gpu_layers = 0 if device == "cpu" else -1
        if ":" in device:  # one GPU, and not all that there are
            params.split_mode, params.main_gpu = 0, accelerator.index(device)
        self.handle = library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise Failure(
                f"llama.cpp cannot load {path}: {error_log().take()}. If it was cut short, make or fetch it again"
            )
        self.vocab = library.llama_model_get_vocab(self.handle)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added; the names of special tokens are read as such."""
        data = text.encode()
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = self.library.llama_tokenize(self.vocab, data, len(data), ids, room, False, True)
        if count < 0:
            raise Failure(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        return list(ids[:count])

    def decode(self, ids: list[int], special: bool) -> str:
        """Returns the text of ids, special tokens spelled out or left out."""
        given = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 + 8 * len(ids)
        while True:
            text = ctypes.create_string_buffer(room)
            size = self.library.llama_detokenize(self.vocab, given, len(ids), text, room, False, special)
            if size >= 0:
                return text.raw[:size].decode(errors="replace")
            room = -size

    def close(self) -> None:
        """Frees the model."""
        self.library.llama_model_free(self.handle)


class Batch:
    """A `llama_batch` over numpy arrays: ids, positions and wanted rows `[n]`, and the sequences of each token."""

    def __init__(
        self,
        library: Any,
        ids: Ids,
        positions: Ids,
        owners: list[list[int]],
        wanted: NDArray[np.bool_],
    ) -> None:
        """Takes the arrays; `wanted` are the rows whose logits are needed."""
        self.wanted = int(wanted.sum())
        counts = [len(owner) for owner in owners]
        flat = np.array([sequence for owner in owners for sequence in owner], dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        pointers = (flat.ctypes.data + starts * flat.itemsize).astype(np.uintp)
        self._alive: list[NDArray[Any]] = [  # llama.cpp reads this memory in `llama_decode`
            ids.astype(np.int32),
            positions.astype(np.int32),
            np.array(counts, dtype=np.int32),
            pointers,
            wanted.astype(np.int8),
            flat,
        ]
        self.struct = library.llama_batch(n_tokens=len(ids))
        for field, array in zip(("token", "pos", "n_seq_id", "seq_id", "logits"), self._alive, strict=False):
            kind = dict(library.llama_batch._fields_)[field]
            setattr(self.struct, field, ctypes.cast(array.ctypes.data, kind))
