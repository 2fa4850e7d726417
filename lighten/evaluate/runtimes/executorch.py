"""ExecuTorch programs of causal language models, with their keys and values inside."""

from __future__ import annotations

import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lighten.errors import Failure, RequestError
from lighten.evaluate import machine
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import Capability, Decoding, Floats, Ids, Runtime, Timings
from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.model.executorch_library import FORWARD, PROGRAM, load

SUFFIX = ".pte"
_ARITHMETIC = {32: "float32", 8: "int8", 4: "int4"}
_NOT_TOLD = "not told"
"""Arithmetic of programs of other makers, which do not say it."""


class ExecuTorchOpener(Opener[Path]):
    """Directories with a model.pte, and .pte files themselves."""

    name: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    modules: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str | None] = "executorch"
    weights: ClassVar[tuple[str, ...]] = (SUFFIX,)
    every_head: ClassVar[bool] = True

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`."""
        if isinstance(target, str):
            return None
        file = target / PROGRAM if target.is_dir() else target
        return file if file.suffix == SUFFIX and file.is_file() else None

    def open(self, place: Path, conditions: Conditions) -> Runtime:
        """See `Opener`. The programs are for the processor."""
        return ExecuTorchRuntime(place)


class ExecuTorchRuntime(Defaults):
    """A program whose `forward` takes ids and a position. See `Runtime` for the methods."""

    name = "executorch"
    device = "cpu"
    capabilities: frozenset[Capability] = frozenset({"logits", "scores", "decodes"})

    def __init__(self, file: Path) -> None:
        """Loads a program.

        Raises:
            RequestError: executorch is missing, or the program is no causal language model with its cache inside.
            Failure: the file is damaged.
        """
        self.file = file
        runtime = load("running an ExecuTorch program")
        try:
            self._program = runtime.load_program(file)
            names = self._program.method_names
        except RuntimeError as error:
            raise Failure(
                f"{file} cannot be read ({_reason(error)}): cut short or damaged; export or fetch it again"
            ) from error
        self._check(names)
        self.vocab = self._told("get_vocab_size")
        self.context: int | None = self._told("get_max_context_len")
        self._most = self._told("get_max_seq_len")
        self.dtype = _ARITHMETIC.get(self._told("get_weight_bits", 0), _NOT_TOLD)
        self.detail = f"executorch {version('executorch')}, XNNPACK"
        self._tokenizer: HfTokenizer | None = None

    def _check(self, names: set[str]) -> None:
        """Raises RequestError if the program is none that can be measured here."""
        needed = {FORWARD, "get_vocab_size", "get_max_seq_len", "get_max_context_len", "use_kv_cache"}
        if lacking := sorted(needed - names):
            raise RequestError(
                f"{self.file} has no method {lacking[0]}, so it is no causal language model that can be measured here"
            )
        meta = self._program.metadata(FORWARD)
        shapes = [tuple(meta.input_tensor_meta(number).sizes()) for number in range(meta.num_inputs())]
        if not self._told("use_kv_cache") or len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != (1,):
            raise RequestError(
                f"{self.file} takes inputs of {', '.join(map(str, shapes))}, and not ids and one position: export it "
                "again with its cache inside"
            )

    def _told(self, name: str, otherwise: int | None = None) -> int:
        """Returns what a method without inputs says."""
        if otherwise is not None and name not in self._program.method_names:
            return otherwise
        return int(self._program.load_method(name).execute([])[0])

    @cached_property
    def _forward(self) -> Any:
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(machine.cores())
        try:
            return self._program.load_method(FORWARD)
        except RuntimeError as error:
            raise Failure(f"executorch cannot load {self.file}: {_reason(error)}") from error

    def _run(self, ids: Ids, before: int) -> Floats:
        """Returns logits for ids `[n]` behind `before` tokens of the cache: of all, `[n, vocab]`, or of the last."""
        import torch

        if self.context is not None and before + len(ids) > self.context:
            raise Failure(
                f"{self.file} has a cache of {self.context} positions, and the text has {before + len(ids)}: measure "
                "shorter texts, or export it with a larger context"
            )
        found = []
        try:
            for first in range(0, len(ids), self._most):
                part = torch.from_numpy(np.array(ids[first : first + self._most], np.int64))[None]
                logits = self._forward.execute([part, torch.tensor([before + first])])[0]
                found.append(logits.float().numpy().reshape(-1, self.vocab))
        except RuntimeError as error:
            raise Failure(f"executorch failed on {len(ids)} tokens of {self.file}: {_reason(error)}") from error
        rows: Floats = found[0] if len(found) == 1 else np.concatenate(found)
        return rows

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`.

        Raises:
            RequestError: the program gives the logits of the last token only.
        """
        rows = self._run(ids, 0)
        if len(rows) != len(ids):
            raise RequestError(
                f"{self.file} computes the logits of the last token only, and this measurement needs those of all: "
                "export it again with all of them"
            )
        return rows

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`. The program has one cache, so a batch is decoded row by row.

        Raises:
            Failure: there is more than one row.
        """
        if len(prompt) > 1:
            raise Failure("an ExecuTorch program has one cache, so its batches have one row")
        times, ids, before, written = [time.perf_counter()], prompt[0], 0, []
        for _ in range(steps):
            best = int(self._run(ids, before)[-1].argmax())
            before += len(ids)
            ids = np.array([best])
            times.append(time.perf_counter())
            written.append(best)
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]], np.array([written]))

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        ids, before = prompt, 0
        for _ in range(most):
            logits = self._run(np.array(ids), before)[-1].copy()
            before += len(ids)
            ids = [(yield logits)]

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self._tokenizer is None:
            self._tokenizer = HfTokenizer(self.file.parent)
        return self._tokenizer.encode(text)

    def close(self) -> None:
        """See `Runtime`."""
        self.__dict__.pop("_forward", None)
        del self._program


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
