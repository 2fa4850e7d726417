"""ONNX graphs with a key-value cache, through onnxruntime. onnxruntime-genai decodes if it can."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lighten.errors import Failure, RequestError, missing_extra
from lighten.evaluate import machine
from lighten.evaluate.runtimes.batches import Layout, by_length, read_scores
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.onnx_packed import Packed, packable
from lighten.evaluate.runtimes.onnx_texts import OnnxTexts
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import Capability, Decoding, Floats, Ids, Question, Runtime, Score, Timings
from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.model import accelerator
from lighten.model.files import read_json
from lighten.model.onnx_source import GENAI, KEY, find_onnx, genai, read_graph, task_of
from lighten.step import Report

STATE, PRESENT = "past.", "present."
"""Beginnings of the names of states of one size, and of what a graph gives to take in the next step."""
BATCH_TOKENS = 384
TYPES = {1: np.float32, 10: np.float16, 7: np.int64, 6: np.int32}
Cache = dict[str, NDArray[Any]]


class OnnxOpener(Opener[Path]):
    """.onnx files, and directories that hold one."""

    name: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxruntime-genai")
    modules: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    extra: ClassVar[str | None] = "onnx"
    weights: ClassVar[tuple[str, ...]] = (".onnx", ".onnx.data")
    compressible: ClassVar[bool] = True
    every_head: ClassVar[bool] = True
    profiler: ClassVar[str | None] = "lighten.evaluate.profiling.onnx:phases"

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`."""
        return None if isinstance(target, str) else find_onnx(target)

    def open(self, place: Path, conditions: Conditions) -> Runtime:
        """See `Opener`."""
        task = task_of(place)
        return OnnxRuntime(place, conditions.device) if task == "causal" else OnnxTexts(place, task)

    def predicts_tokens(self, place: Path) -> bool:
        """See `Opener`."""
        return task_of(place) == "causal"


class OnnxRuntime(Defaults):
    """An ONNX graph of a causal language model. See `Runtime` for the methods."""

    name = "onnxruntime"
    capabilities: frozenset[Capability] = frozenset({"logits", "scores", "decodes"})

    def __init__(self, path: Path, device: str) -> None:
        """Reads the graph; the weights are loaded by the first use, by whichever library does the work.

        Args:
            path: the .onnx file.
            device: "cpu", or "cuda" where onnxruntime has it.

        Raises:
            RequestError: onnxruntime is missing, or the graph is no causal language model with a cache.
            Failure: the file or its data file is missing or damaged.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_extra("onnx", "onnxruntime", "running an ONNX model") from error
        self._library = onnxruntime
        self.path = path
        self.graph = read_graph(path)
        if not {"input_ids", "attention_mask"} <= set(self.graph.inputs) or "logits" not in self.graph.outputs:
            raise RequestError(
                f"{path} takes {', '.join(list(self.graph.inputs)[:4])} and gives {', '.join(self.graph.outputs[:3])}: "
                "not a causal language model that can be measured here"
            )
        if strange := [name for name, each in self.graph.inputs.items() if each.kind not in TYPES]:
            raise RequestError(
                f"{path}: its input {strange[0]} is of a type that numpy lacks (bf16): measure an export as fp16"
            )
        self._past = [name for name in self.graph.inputs if name.startswith((KEY, STATE))]
        self._present = [PRESENT + name.removeprefix(KEY).removeprefix(STATE) for name in self._past]
        on_gpu = device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        self.device = device if on_gpu else "cpu"
        self.dtype = self.graph.precision
        self.detail = f"onnxruntime {version('onnxruntime')}"
        settings = genai(path.parent)
        self._genai = bool(settings)
        if self._genai:
            self.detail += _genai_version()
        self._head_size = int(settings.get("decoder", {}).get("head_size", 0))
        self.vocab = self.graph.vocab or int(settings.get("vocab_size", 0))
        if not self.vocab:
            raise Failure(f"{path} does not say how large its vocabulary is, and neither does {GENAI}: export it again")
        self.context: int | None = settings.get("context_length") or _positions(path.parent)
        self._tokenizer: HfTokenizer | None = None
        self.profile: Path | None = None
        """Place where onnxruntime writes its profile of the session; None for no profile."""

    @cached_property
    def _session(self) -> Any:
        return self._open(str(self.path))

    def _open(self, graph: str | bytes, folder: Path | None = None) -> Any:
        """Returns a session of a file, or of a graph in memory with its weights in a folder."""
        session = self._opened(graph, folder)
        if self.device != "cpu" and "CUDAExecutionProvider" not in session.get_providers():
            self.device = "cpu"  # a provider that is listed may still fail to start: what is used counts
            self.detail += " (its CUDA provider did not start)"
        return session

    def _opened(self, graph: str | bytes, folder: Path | None) -> Any:
        options = self._library.SessionOptions()
        if folder:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.intra_op_num_threads = machine.cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if self.profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile)
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device != "cpu":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": str(accelerator.index(self.device))}))
        try:
            return self._library.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # its own exceptions share no base class
            raise Failure(f"onnxruntime cannot load {self.path}: {_reason(error)}") from error

    def _run(self, ids: Ids, past: Cache | None, outputs: list[str]) -> list[Any]:
        """Runs the graph on `ids [batch, n]` after a cache."""
        batch, length = ids.shape
        past = self._empty(batch) if past is None else past
        before = next((each.shape[2] for name, each in past.items() if name.startswith(KEY)), 0)
        feed: dict[str, Any] = {
            "input_ids": ids.astype(TYPES[self.graph.inputs["input_ids"].kind]),
            "attention_mask": np.ones((batch, before + length), TYPES[self.graph.inputs["attention_mask"].kind]),
            **past,
        }
        if "position_ids" in self.graph.inputs:
            feed["position_ids"] = np.tile(np.arange(before, before + length), (batch, 1))
        try:
            found: list[Any] = self._session.run(outputs, feed)
        except Exception as error:
            raise Failure(f"onnxruntime failed on {length} tokens of {self.path}: {_reason(error)}") from error
        return found

    def _empty(self, batch: int, length: int = 0) -> Cache:
        empty: Cache = {}
        for name in self._past:
            shape = self.graph.inputs[name].shape
            inner = shape[1:] if name.startswith(STATE) else [shape[1], length, shape[3] or self._head_size]
            empty[name] = np.zeros((batch, *inner), TYPES[self.graph.inputs[name].kind])
        return empty

    def _cached(self, ids: Ids, past: Cache | None) -> tuple[NDArray[Any], Cache]:
        logits, *present = self._run(ids, past, ["logits", *self._present])
        return logits, dict(zip(self._past, present, strict=True))

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        found: Floats = self._run(ids[None], None, ["logits"])[0][0].astype(np.float32, copy=False)
        return found

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`. Questions run in rows if the attention takes a mask, else one after the other."""
        scores: list[list[Score]] = [[] for _ in questions]
        start, done, tokens = time.monotonic(), 0, 0
        report(0, len(questions), "")
        packed = self._packed
        for batch in by_length(questions, BATCH_TOKENS if packed else 1, padded=False):
            asked = [questions[index] for index in batch]
            if packed and packed.takes(asked):
                found = packed.score([Layout(each) for each in asked])
            else:
                found = [self._score(each) for each in asked]
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
            done += len(batch)
            tokens += sum(each.packed for each in asked)
            report(done, len(questions), f"{tokens / (time.monotonic() - start):.0f} tok/s")
        return scores

    @cached_property
    def _packed(self) -> Packed | None:
        """Graph with a mask, if it gives the same scores as without."""
        states = any(name.startswith(STATE) for name in self._past)  # a state runs through a row of questions
        found = packable(self.path) if self.device == "cpu" and not states else None
        if found is None:
            return None
        graph, window = found
        packed = Packed(self._open(graph, self.path.parent), window, lambda length: self._empty(1, length))
        return packed if packed.agrees(self.vocab) else None

    def _score(self, question: Question) -> list[Score]:
        """Computes the context once. Its cache serves all endings; the attention takes one at a time."""
        shared, past = self._cached(np.array(question.context)[None], None)
        rows = [shared[0, -1:]]
        for ending in question.endings:
            if len(ending) > 1:
                rows.append(self._run(np.array(ending[:-1])[None], past, ["logits"])[0][0])
        return read_scores(np.concatenate(rows).astype(np.float32, copy=False), [Layout(question)])[0]

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`."""
        return self._generate_with_genai(prompt, steps) if self._genai else self._generate(prompt, steps)

    def _generate(self, prompt: Ids, steps: int) -> Timings:
        ids, past, times = prompt, None, [time.perf_counter()]
        for _ in range(steps):
            logits, past = self._cached(ids, past)
            ids = logits[:, -1].argmax(-1)[:, None]
            times.append(time.perf_counter())
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]])

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        ids, past = prompt, None
        for _ in range(most):
            logits, past = self._cached(np.array(ids)[None], past)
            ids = [(yield logits[0, -1].astype(np.float32, copy=False))]

    @cached_property
    def _decoder(self) -> Any:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise missing_extra("onnx", "onnxruntime-genai", "decoding with an ONNX model") from error
        threads = {"model": {"decoder": {"session_options": {"intra_op_num_threads": machine.cores()}}}}
        try:
            config = onnxruntime_genai.Config(str(self.path.parent))
            config.clear_providers()
            if self.device != "cpu":
                config.append_provider("cuda")
                config.set_provider_option("cuda", "device_id", str(accelerator.index(self.device)))
            config.overlay(json.dumps(threads))
            return onnxruntime_genai.Model(config)
        except Exception as error:
            raise Failure(f"onnxruntime-genai cannot load {self.path.parent}: {_reason(error)}") from error

    def _generate_with_genai(self, prompt: Ids, steps: int) -> Timings:
        import onnxruntime_genai

        batch, length = prompt.shape
        total = length + steps
        params = onnxruntime_genai.GeneratorParams(self._decoder)
        # an end of text does not end it before the shortest length
        params.set_search_options(do_sample=False, batch_size=batch, max_length=total, min_length=total)
        generator = onnxruntime_genai.Generator(self._decoder, params)
        times = [time.perf_counter()]
        generator.append_tokens(prompt.astype(np.int32))
        for _ in range(steps):
            generator.generate_next_token()
            times.append(time.perf_counter())
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]])

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self._tokenizer is None:
            self._tokenizer = HfTokenizer(self.path.parent)
        return self._tokenizer.encode(text)

    def end_profile(self) -> str:
        """Returns the file that onnxruntime wrote its profile into."""
        return str(self._session.end_profiling())

    def close(self) -> None:
        """See `Runtime`."""
        self.__dict__.pop("_session", None)
        self.__dict__.pop("_packed", None)
        self.__dict__.pop("_decoder", None)


def _positions(folder: Path) -> int | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    positions: int | None = read_json(file, "export the model again").get("max_position_embeddings")
    return positions


def _genai_version() -> str:
    from importlib.util import find_spec

    return f" + onnxruntime-genai {version('onnxruntime-genai')}" if find_spec("onnxruntime_genai") else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
