"""GGUF files, through llama.h."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lighten.errors import Failure
from lighten.evaluate import machine
from lighten.evaluate.runtimes.batches import Layout, by_length, read_scores
from lighten.evaluate.runtimes.runtime import Decoding, Floats, Ids, Question, Score, Text, Timings
from lighten.model import accelerator
from lighten.model.gguf_source import check_header
from lighten.model.llama_library import Library, load
from lighten.step import Report, silent

BATCH_TOKENS = 512
ENDINGS = 64
ERROR = 4
CONTINUED = 5
FLOAT32 = 0


def _library() -> Library:
    return load("running a GGUF file")


class _Log:
    """What llama.cpp reports as errors; everything else it says is dropped."""

    def __init__(self, library: Any) -> None:
        self._lines: list[str] = []
        self._level = 0
        self._library = library
        self._callback = library.llama_log_callback(self._write)

    def listen(self) -> None:
        """Takes llama.cpp's messages from here on, and forgets the earlier ones."""
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
def _log() -> _Log:
    """Returns the log of the process: llama.cpp has one for all its models, and it must outlive them."""
    return _Log(_library().api)


class _Model:
    """A loaded GGUF file: its weights, or its vocabulary only."""

    def __init__(self, path: Path, device: str, vocab_only: bool) -> None:
        check_header(path)
        loaded = _library()
        self.library = library = loaded.api
        _log().listen()
        params = library.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = loaded.repacks
        params.n_gpu_layers = 0 if device == "cpu" else -1
        if ":" in device:  # one GPU, and not all that there are
            params.split_mode, params.main_gpu = 0, accelerator.index(device)
        self.handle = library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise Failure(f"llama.cpp cannot load {path}: {_log().take()}. If it was cut short, make or fetch it again")
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


class GgufTokenizer:
    """The tokenizer of a GGUF file, without its weights."""

    def __init__(self, path: Path) -> None:
        self._model = _Model(path, "cpu", vocab_only=True)
        library = self._model.library
        adds = library.llama_vocab_get_add_bos(self._model.vocab)
        named = {each: int(getattr(library, f"llama_vocab_{each}")(self._model.vocab)) for each in ("bos", "eos")}
        self.bos: int | None = named["bos"] if adds else None
        self.eos: int | None = named["eos"] if named["eos"] >= 0 else None
        self.prefix: int | None = named["bos"] if named["bos"] >= 0 else self.eos

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""
        return self._model.encode(text)

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Returns the text of ids; special tokens are left out, or spelled out where `special` is true."""
        return self._model.decode(ids, special)

    def ends(self) -> tuple[int, ...]:
        """Returns every id that llama.cpp takes for the end of a text: those of the file, and some that it knows."""
        library, vocab = self._model.library, self._model.vocab
        return tuple(
            each for each in range(library.llama_vocab_n_tokens(vocab)) if library.llama_vocab_is_eog(vocab, each)
        )


class LlamaCppRuntime:
    """A GGUF model. See `Runtime` for the methods."""

    name = "llama.cpp"
    options: Mapping[str, str] = {}

    def __init__(self, path: Path, device: str, *, float32_cache: bool = False) -> None:
        """Loads the model; keys and values are kept in float16 unless `float32_cache`.

        Raises:
            RequestError: no package brings llama.cpp.
            Failure: the file does not load.
        """
        loaded = _library()
        self._library = library = loaded.api
        on_gpu = device != "cpu" and library.llama_supports_gpu_offload()
        self.device = device if on_gpu else "cpu"
        self._model = _Model(path, self.device, vocab_only=False)
        self.dtype = library.llama_ftype_name(library.llama_model_ftype(self._model.handle)).decode()
        self.detail = str(loaded.installed)
        self.vocab = int(library.llama_vocab_n_tokens(self._model.vocab))
        self.context: int | None = int(library.llama_model_n_ctx_train(self._model.handle)) or None
        self._context: Any = None
        self._shape: tuple[int, int, bool] = (0, 0, False)
        self._callback: Any = None
        self._float32_cache = float32_cache

    def _open_context(self, tokens: int, sequences: int, shared: bool) -> Any:
        """Returns an empty context for `tokens` in all; kept and cleared for as long as the shape stays the same."""
        library = self._library
        if self._shape != (tokens, sequences, shared):
            self._free_context()
            params = library.llama_context_default_params()
            params.n_ctx = params.n_batch = tokens
            params.n_ubatch = min(tokens, BATCH_TOKENS)
            params.n_seq_max = sequences
            params.kv_unified = shared
            params.n_threads = params.n_threads_batch = machine.cores()
            if self._float32_cache:
                params.type_k = params.type_v = FLOAT32
                params.flash_attn_type = 0  # on processors it rounds to 16 bits, whatever the cache is
            if self._callback:
                params.cb_eval = self._callback
            self._context = library.llama_init_from_model(self._model.handle, params)
            if not self._context:
                raise Failure(f"llama.cpp cannot make room for {tokens} tokens: {_log().take()}")
            self._shape = (tokens, sequences, shared)
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        return self._context

    def _free_context(self) -> None:
        if self._context:
            self._library.llama_free(self._context)
        self._context, self._shape = None, (0, 0, False)

    def _decode(self, context: Any, batch: _Batch) -> Floats:
        """Returns the logits of the wanted rows, `[rows, vocab]`: llama.cpp's own memory, until the next call."""
        code = self._library.llama_decode(context, batch.struct)
        if code:
            raise Failure(f"llama.cpp failed to decode {batch.struct.n_tokens} tokens (code {code}): {_log().take()}")
        pointer = self._library.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (batch.wanted, self.vocab))

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        context = self._open_context(len(ids), 1, False)
        every = np.ones(len(ids), dtype=np.bool_)
        return self._decode(context, _Batch(self._library, ids, np.arange(len(ids)), [[0]] * len(ids), every))

    def watch(self, callback: Any) -> None:
        """Lets ggml call `callback(tensor, asking, data)` for every tensor from here on; None stops that."""
        self._free_context()
        kind = type(self._library.llama_context_default_params().cb_eval)
        self._callback = kind(callback) if callback else None

    def watched(self, callback: Any, ids: Ids) -> None:
        """Computes `ids [n]` in one batch while ggml calls `callback(tensor, asking, data)` for every tensor."""
        library = self._library
        self._free_context()
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
        params.n_threads = params.n_threads_batch = machine.cores()
        params.cb_eval = type(params.cb_eval)(callback)
        context = library.llama_init_from_model(self._model.handle, params)
        if not context:
            raise Failure(f"llama.cpp cannot make room for {len(ids)} tokens: {_log().take()}")
        try:
            every = np.ones(len(ids), dtype=np.bool_)
            self._decode(context, _Batch(library, ids, np.arange(len(ids)), [[0]] * len(ids), every))
        finally:
            library.llama_free(context)

    def hidden(self) -> Floats | None:
        """See `Runtime`: llama.cpp does not show it."""
        return None

    def choose(self, context: list[int], endings: list[list[int]]) -> list[Score]:
        """See `Runtime`."""
        return self.choose_many([Question(context, endings)], silent)[0]

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`. An ending is a sequence, and the tokens of a context belong to all its endings' sequences."""
        scores: list[list[Score]] = [[] for _ in questions]
        if not questions:
            return scores
        tokens = max(BATCH_TOKENS, *(question.packed for question in questions))
        sequences = max(ENDINGS, *(len(question.endings) for question in questions))
        start, done, computed = time.monotonic(), 0, 0
        report(0, len(questions), "")
        for batch in by_length(questions, BATCH_TOKENS, padded=False, sequences=sequences):
            layouts = [Layout(questions[index]) for index in batch]
            found = self._score(layouts, self._open_context(tokens, sequences, True))
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
            done += len(batch)
            computed += sum(len(layout.ids) for layout in layouts)
            report(done, len(questions), f"{computed / (time.monotonic() - start):.0f} tok/s")
        return scores

    def _score(self, layouts: list[Layout], context: Any) -> list[list[Score]]:
        owners: list[list[int]] = []
        wanted = []
        sequence = 0
        for layout in layouts:
            own = list(range(sequence, sequence + len(layout.picks)))
            owners += [own if segment == 0 else [own[segment - 1]] for segment in layout.segments]
            wanted.append(np.isin(np.arange(len(layout.ids)), layout.wanted))
            sequence += len(own)
        ids = np.concatenate([layout.ids for layout in layouts])
        positions = np.concatenate([layout.positions for layout in layouts])
        batch = _Batch(self._library, ids, positions, owners, np.concatenate(wanted))
        return read_scores(self._decode(context, batch), layouts)

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`."""
        batch, length = prompt.shape
        context = self._open_context(batch * (length + steps), batch, False)
        owners = [[sequence] for sequence in range(batch)]
        start = time.perf_counter()
        last = np.tile(np.arange(length) == length - 1, batch)
        where = np.tile(np.arange(length), batch)
        whole = [owner for owner in owners for _ in range(length)]
        ids = self._decode(context, _Batch(self._library, prompt.ravel(), where, whole, last)).argmax(-1)
        times = [start, time.perf_counter()]
        every = np.ones(batch, dtype=np.bool_)
        for step in range(1, steps):
            at = np.full(batch, length + step - 1)
            ids = self._decode(context, _Batch(self._library, ids, at, owners, every)).argmax(-1)
            times.append(time.perf_counter())
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]])

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        context = self._open_context(len(prompt) + most, 1, False)
        ids, start = prompt, 0
        for _ in range(most):
            places = np.arange(start, start + len(ids))
            batch = _Batch(self._library, np.array(ids), places, [[0]] * len(ids), places == places[-1])
            start += len(ids)
            ids = [(yield self._decode(context, batch)[0])]

    def text(self, most: int) -> Text:
        """See `Runtime`."""
        return _Text(self, most)

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        return self._model.encode(text)

    def peak_vram_bytes(self) -> int | None:
        """See `Runtime`: llama.cpp does not tell."""
        return None

    def close(self) -> None:
        """See `Runtime`."""
        self._free_context()
        self._model.close()


class _Text:
    """See `Text`."""

    def __init__(self, runtime: LlamaCppRuntime, most: int) -> None:
        self._runtime = runtime
        self._context = runtime._open_context(most, 1, False)
        self.length = 0

    def extend(self, ids: list[int], wanted: int) -> list[int]:
        """See `Text`."""
        places = np.arange(self.length, self.length + len(ids))
        self.length += len(ids)
        rows = places >= self.length - wanted
        batch = _Batch(self._runtime._library, np.array(ids), places, [[0]] * len(ids), rows)
        found: list[int] = self._runtime._decode(self._context, batch).argmax(-1).tolist()
        return found

    def cut(self, length: int) -> None:
        """See `Text`."""
        library = self._runtime._library
        library.llama_memory_seq_rm(library.llama_get_memory(self._context), 0, length, -1)
        self.length = length


class _Batch:
    """A `llama_batch` over numpy arrays: ids, positions and wanted rows `[n]`, and the sequences of each token."""

    def __init__(
        self,
        library: Any,
        ids: Ids,
        positions: Ids,
        owners: list[list[int]],
        wanted: NDArray[np.bool_],
    ) -> None:
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
