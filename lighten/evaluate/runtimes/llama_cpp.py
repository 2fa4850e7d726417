"""GGUF files, through llama.h."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lighten.errors import Failure
from lighten.evaluate import machine
from lighten.evaluate.runtimes.batches import Layout, by_length, longest_first, read_scores
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.llama_binding import Batch, GgufModel, error_log, load_llama
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import (
    Capability,
    Choose,
    Decoding,
    Floats,
    Ids,
    Question,
    Score,
    Server,
    Text,
    Timings,
    Tokenizer,
)
from lighten.model import llama_library
from lighten.model.gguf_header import is_gguf, within
from lighten.step import Report

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.words import Words

BATCH_TOKENS = 512
ENDINGS = 64
SEQUENCES = 16
"""Maximum number of texts that are written at the same time."""
CACHE_BYTES = 1_000_000_000
"""Maximum number of bytes of their keys and values."""
FLOAT32 = 0


class LlamaCppOpener(Opener[Path]):
    """GGUF files, and directories that hold one."""

    name: ClassVar[str] = "llama.cpp"
    packages: ClassVar[tuple[str, ...]] = llama_library.PACKAGES
    weights: ClassVar[tuple[str, ...]] = (".gguf",)
    compressible: ClassVar[bool] = True
    together: ClassVar[int | None] = BATCH_TOKENS
    profiler: ClassVar[str | None] = "lighten.evaluate.profiling.llama_cpp:phases"
    tracer: ClassVar[str | None] = "lighten.evaluate.runtimes.trace:of_llama_cpp"

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`: the file itself, the first one of a model in parts."""
        if isinstance(target, str):
            return None
        return target if is_gguf(target) else within(target)

    def open(self, place: Path, conditions: Conditions) -> LlamaCppRuntime:
        """See `Opener`."""
        return LlamaCppRuntime(place, conditions.device)

    def tokenizer(self, place: Path) -> Tokenizer:
        """See `Opener`: the tokenizer in the file."""
        from lighten.evaluate.runtimes.gguf_tokenizer import GgufTokenizer

        return GgufTokenizer(place)

    def words(self, place: Path) -> Words:
        """See `Opener`: the words of the file."""
        from lighten.evaluate.runtimes.gguf_tokenizer import gguf_words

        return gguf_words(place)

    def multiplies_in(self, dtype: str, device: str) -> str:
        """See `Opener`: the inputs of quantized weights are rounded to 8 bits on a GPU too."""
        quantized = dtype.lower() not in ("float32", "f32", "all f32", "bfloat16", "bf16", "float16", "f16")
        return "int8" if quantized else super().multiplies_in(dtype, device)

    def server(self, place: Path, context: int, device: str) -> AbstractContextManager[Server]:
        """See `Opener`."""
        from lighten.evaluate.speed.server import LlamaServer

        return LlamaServer(place, context, device)


class LlamaCppRuntime(Defaults):
    """A GGUF model. See `Runtime` for the methods."""

    name = "llama.cpp"
    capabilities: frozenset[Capability] = frozenset({"logits", "scores", "decodes", "rewinds"})

    def __init__(self, path: Path, device: str, *, float32_cache: bool = False) -> None:
        """Loads the model; keys and values are kept in float16 unless `float32_cache`.

        Raises:
            RequestError: no package brings llama.cpp.
            Failure: the file does not load.
        """
        loaded = load_llama()
        self._library = library = loaded.api
        on_gpu = device != "cpu" and library.llama_supports_gpu_offload()
        self.device = device if on_gpu else "cpu"
        self._model = GgufModel(path, self.device, vocab_only=False)
        self.dtype = library.llama_ftype_name(library.llama_model_ftype(self._model.handle)).decode()
        self.detail = str(loaded.installed)
        self.vocab = int(library.llama_vocab_n_tokens(self._model.vocab))
        self.context: int | None = int(library.llama_model_n_ctx_train(self._model.handle)) or None
        self._context: Any = None
        self._shape: tuple[int, int, bool] = (0, 0, False)
        self._callback: Any = None
        self._float32_cache = float32_cache

    def _open_context(self, tokens: int, sequences: int, shared: bool) -> Any:
        """Returns an empty context for `tokens` tokens. It is kept, and cleared, while the shape stays the same."""
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
                raise Failure(f"llama.cpp cannot make room for {tokens} tokens: {error_log().take()}")
            self._shape = (tokens, sequences, shared)
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        return self._context

    def _free_context(self) -> None:
        if self._context:
            self._library.llama_free(self._context)
        self._context, self._shape = None, (0, 0, False)

    def _decode(self, context: Any, batch: Batch) -> Floats:
        """Returns the logits of the wanted rows, `[rows, vocab]`: llama.cpp's own memory, until the next call."""
        code = self._library.llama_decode(context, batch.struct)
        if code:
            raise Failure(
                f"llama.cpp failed to decode {batch.struct.n_tokens} tokens (code {code}): {error_log().take()}"
            )
        pointer = self._library.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (batch.wanted, self.vocab))

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        context = self._open_context(len(ids), 1, False)
        every = np.ones(len(ids), dtype=np.bool_)
        return self._decode(context, Batch(self._library, ids, np.arange(len(ids)), [[0]] * len(ids), every))

    def watch(self, callback: Any) -> None:
        """Makes ggml call `callback(tensor, asking, data)` for every tensor from now on; None stops that."""
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
            raise Failure(f"llama.cpp cannot make room for {len(ids)} tokens: {error_log().take()}")
        try:
            every = np.ones(len(ids), dtype=np.bool_)
            self._decode(context, Batch(library, ids, np.arange(len(ids)), [[0]] * len(ids), every))
        finally:
            library.llama_free(context)

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
        batch = Batch(self._library, ids, positions, owners, np.concatenate(wanted))
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
        ids = self._decode(context, Batch(self._library, prompt.ravel(), where, whole, last)).argmax(-1)
        times = [start, time.perf_counter()]
        every = np.ones(batch, dtype=np.bool_)
        for step in range(1, steps):
            at = np.full(batch, length + step - 1)
            ids = self._decode(context, Batch(self._library, ids, at, owners, every)).argmax(-1)
            times.append(time.perf_counter())
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]])

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        context = self._open_context(len(prompt) + most, 1, False)
        ids, start = prompt, 0
        for _ in range(most):
            places = np.arange(start, start + len(ids))
            batch = Batch(self._library, np.array(ids), places, [[0]] * len(ids), places == places[-1])
            start += len(ids)
            ids = [(yield self._decode(context, batch)[0])]

    def decode_many(self, prompts: Sequence[list[int]], most: Sequence[int], choose: Choose) -> None:
        """See `Runtime`. Each text is a sequence. The next prompt takes the place of a text that has ended."""
        waiting = longest_first(prompts, most)[::-1]
        if not waiting:
            return
        room = max(len(prompts[number]) + most[number] for number in waiting)
        places = max(1, min(SEQUENCES, len(waiting), CACHE_BYTES // (room * self._bytes_per_token())))
        context = self._open_context(places * room, places, True)
        memory = self._library.llama_get_memory(context)
        free, texts = list(range(places)), dict[int, _Written]()
        while waiting or texts:
            while waiting and free:
                number = waiting.pop()
                texts[free.pop()] = _Written(number, prompts[number], most[number])
            ids = np.concatenate([each.ids for each in texts.values()])
            at = np.concatenate([each.read + np.arange(len(each.ids)) for each in texts.values()])
            last = np.concatenate([np.arange(len(each.ids)) == len(each.ids) - 1 for each in texts.values()])
            owners = [[sequence] for sequence, each in texts.items() for _ in each.ids]
            logits = self._decode(context, Batch(self._library, ids, at, owners, last))
            for row, (sequence, each) in zip(logits, list(texts.items()), strict=True):
                token = choose(each.number, row)
                if not each.continues(token):
                    del texts[sequence]
                    self._library.llama_memory_seq_rm(memory, sequence, -1, -1)
                    free.append(sequence)

    def _bytes_per_token(self) -> int:
        """Returns about how many bytes of keys and values a token takes."""
        library, model = self._library, self._model.handle
        width = library.llama_model_n_embd(model) // max(1, library.llama_model_n_head(model))
        kept = max(1, library.llama_model_n_head_kv(model)) * width
        return int(2 * (4 if self._float32_cache else 2) * library.llama_model_n_layer(model) * max(1, kept))

    def text(self, most: int) -> Text:
        """See `Runtime`."""
        return _Text(self, most)

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        return self._model.encode(text)

    def close(self) -> None:
        """See `Runtime`."""
        self._free_context()
        self._model.close()


@dataclass
class _Written:
    """A text that is being written."""

    number: int
    ids: list[int]
    """Ids to compute next: the prompt, then a token at a time."""
    left: int
    """Tokens that may still be chosen."""
    read: int = 0
    """Ids in the cache."""

    def continues(self, token: int | None) -> bool:
        """Takes a chosen token. Returns whether the text goes on."""
        self.read += len(self.ids)
        self.left -= 1
        if token is None or not self.left:
            return False
        self.ids = [token]
        return True


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
        batch = Batch(self._runtime._library, np.array(ids), places, [[0]] * len(ids), rows)
        found: list[int] = self._runtime._decode(self._context, batch).argmax(-1).tolist()
        return found

    def cut(self, length: int) -> None:
        """See `Text`."""
        library = self._runtime._library
        library.llama_memory_seq_rm(library.llama_get_memory(self._context), 0, length, -1)
        self.length = length
