"""OpenVINO graphs with their keys and values inside.

Decoding computes the head for the last token only, as openvino-genai has it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lighten.errors import Failure, RequestError
from lighten.evaluate import machine
from lighten.evaluate.runtimes.batches import Layout, read_scores
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.evaluate.runtimes.runtime import Capability, Decoding, Floats, Ids, Question, Runtime, Score, Timings
from lighten.evaluate.runtimes.tokenizer import HfTokenizer
from lighten.model.checkpoint import read_config
from lighten.model.openvino_library import load
from lighten.step import Report

GRAPH, WEIGHTS, TOKENIZER = "openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml"
SERVED = "served"
"""What stands for the arithmetic that OpenVINO chooses on this machine."""
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Properties with which nothing is rounded but what the file has rounded."""
NAMES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    **dict.fromkeys(("u8", "i8"), "int8"),
    **dict.fromkeys(("u4", "i4"), "int4"),
    **dict.fromkeys(("u2", "i2"), "int2"),
}
"""Names of the types of weights."""
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
HEAD_DEPTH = 8
"""Operators after the product of the head, which may scale or convert."""


class OpenVinoOpener(Opener[Path]):
    """Directories with an openvino_model.xml, and that file itself."""

    name: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "openvino-genai", "openvino-tokenizers")
    modules: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str | None] = "openvino"
    weights: ClassVar[tuple[str, ...]] = (WEIGHTS,)

    def recognises(self, target: Target) -> Path | None:
        """See `Opener`."""
        if isinstance(target, str):
            return None
        folder = target.parent if target.name == GRAPH else target
        if not (folder / GRAPH).is_file() or any(folder.glob("*.safetensors")):
            return None
        return folder

    def open(self, place: Path, conditions: Conditions) -> Runtime:
        """See `Opener`. OpenVINO has its own devices: a model for CUDA runs on the processor."""
        return OpenVinoRuntime(place, exact=conditions.dtype != SERVED)

    def served_in(self, device: str) -> str | None:
        """See `Opener`: the plugin of a device chooses, and the details of a measurement tell what it chose."""
        return SERVED


class OpenVinoRuntime(Defaults):
    """A stateful OpenVINO graph of a causal language model. See `Runtime` for the methods."""

    name = "openvino"
    device = "cpu"
    capabilities: frozenset[Capability] = frozenset({"logits", "scores", "decodes"})

    def __init__(self, folder: Path, *, exact: bool) -> None:
        """Reads the graph; it is compiled by the first use, by whichever library does the work.

        Args:
            folder: a directory with openvino_model.xml.
            exact: whether to compute in float32 whatever this machine is quicker in.

        Raises:
            RequestError: openvino is missing, or the graph is no causal language model with its cache inside.
            Failure: a file is missing or damaged.
        """
        self.folder = folder
        self._core = load("running an OpenVINO model").Core()
        if not (folder / WEIGHTS).is_file():
            raise Failure(f"{folder / GRAPH} has its weights in {WEIGHTS}, which is missing: copy it beside it")
        try:
            self._graph = self._core.read_model(folder / GRAPH)
        except Exception as error:  # all errors of the library are RuntimeError, and some come from its bindings
            raise Failure(
                f"{folder / GRAPH} cannot be read ({_reason(error)}): cut short or damaged; export or fetch it again"
            ) from error
        self._inputs = [port.any_name for port in self._graph.inputs]
        self._check()
        self.exact = exact
        self._settings = {"INFERENCE_NUM_THREADS": machine.cores(), **(EXACT if exact else {})}
        self.dtype = _precision(self._graph)
        self.detail = _versions()
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        width = self._graph.output("logits").partial_shape[-1]
        self.vocab = int(width.get_length()) if width.is_static else int(config.get("vocab_size", 0))
        if not self.vocab:
            raise Failure(f"{folder} does not say how large its vocabulary is: add its config.json, or export it again")
        self.context: int | None = config.get("max_position_embeddings")
        self._tokenizer: Any = None

    def _check(self) -> None:
        """Raises RequestError if the graph is none that can be measured here."""
        outputs = [name for port in self._graph.outputs for name in port.names]
        known = {"input_ids", "attention_mask"} <= set(self._inputs) and "logits" in outputs
        if not known:
            raise RequestError(
                f"{self.folder / GRAPH} takes {', '.join(self._inputs[:4])} and gives {', '.join(outputs[:3])}: not a "
                "causal language model that can be measured here"
            )
        if strange := [name for name in self._inputs if name not in INPUTS]:
            cache = any(name.startswith("past_key_values") for name in strange)
            raise RequestError(
                f"{self.folder / GRAPH} also takes {strange[0]}: "
                + (
                    "convert it again with its cache inside (stateful)"
                    if cache
                    else "such a model is not measured here"
                )
            )
        if not self._graph.get_variables():
            raise RequestError(
                f"{self.folder / GRAPH} keeps no keys and values: convert it again with its cache inside"
            )

    @cached_property
    def _whole(self) -> Any:
        return self._compiled(self._graph)

    @cached_property
    def _last(self) -> Any:
        """Computes the logits of the last token only."""
        return self._compiled(_last_only(self._graph.clone()))

    def _compiled(self, graph: Any) -> Any:
        try:
            compiled = self._core.compile_model(graph, "CPU", self._settings)
            request = compiled.create_infer_request()
        except Exception as error:
            raise Failure(f"openvino cannot load {self.folder / GRAPH}: {_reason(error)}") from error
        self._note(compiled.get_property)
        return request

    def _note(self, read: Any) -> None:
        """Adds to the details what is computed in."""
        computed, kept = (read(name).get_type_name() for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"))
        self.detail = f"{_versions()}, computes in {computed}, keeps keys and values in {kept}"

    def _run(self, request: Any, ids: Ids, before: int, beams: Ids | None = None) -> Floats:
        """Returns the logits for `ids [batch, n]` after `before` tokens of the cache; valid until the next run.

        `beams` names the row of the cache that each row continues.
        """
        batch, length = ids.shape
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, before + length), np.int64),
            "position_ids": np.tile(np.arange(before, before + length), (batch, 1)),
            "beam_idx": (np.arange(batch) if beams is None else beams).astype(np.int32),
        }
        if not before:
            request.reset_state()
        try:
            request.infer({name: feed[name] for name in self._inputs}, share_inputs=False)
        except Exception as error:
            raise Failure(f"openvino failed on {length} tokens of {self.folder}: {_reason(error)}") from error
        found: Floats = request.get_tensor("logits").data.astype(np.float32, copy=False)
        return found

    def logits(self, ids: Ids) -> Floats:
        """See `Runtime`."""
        found: Floats = self._run(self._whole, ids[None], 0)[0]
        return found

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`: each context once, and all its endings together."""
        if "beam_idx" not in self._inputs:
            return super().choose_many(questions, report)
        scores, start, tokens = [], time.monotonic(), 0
        report(0, len(questions), "")
        for number, question in enumerate(questions, 1):
            scores.append(self._score(question))
            tokens += question.packed
            report(number, len(questions), f"{tokens / (time.monotonic() - start):.0f} tok/s")
        return scores

    def _score(self, question: Question) -> list[Score]:
        """Computes the context once. All endings continue its row of the cache, filled up on the right."""
        rows = [self._run(self._whole, np.array(question.context)[None], 0)[0, -1:].copy()]
        rests = [ending[:-1] for ending in question.endings]
        if longest := max(map(len, rests)):
            ids = np.zeros((len(rests), longest), np.int64)
            for row, rest in zip(ids, rests, strict=True):
                row[: len(rest)] = rest
            found = self._run(self._whole, ids, len(question.context), np.zeros(len(rests), np.int64))
            rows += [each[: len(rest)] for each, rest in zip(found, rests, strict=True)]
        return read_scores(np.concatenate(rows), [Layout(question)])[0]

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`."""
        request = self._last
        ids, before, times, written = prompt, 0, [time.perf_counter()], []
        for _ in range(steps):
            logits = self._run(request, ids, before)
            before += ids.shape[1]
            ids = logits[:, -1].argmax(-1)[:, None]
            times.append(time.perf_counter())
            written.append(ids)
        passed = np.diff(times)
        return Timings(float(passed[0]), [float(each) for each in passed[1:]], np.concatenate(written, 1))

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`."""
        ids, before = prompt, 0
        for _ in range(most):
            logits = self._run(self._last, np.array(ids)[None], before)[0, -1].copy()
            before += len(ids)
            ids = [(yield logits)]

    def encode(self, text: str) -> list[int]:
        """See `Runtime`: by the tokenizer's graph, if there is one."""
        if self._tokenizer is None:
            self._tokenizer = _GraphTokenizer.of(self.folder) or HfTokenizer(self.folder)
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def close(self) -> None:
        """See `Runtime`."""
        self.__dict__.pop("_whole", None)
        self.__dict__.pop("_last", None)


class _GraphTokenizer:
    """The tokenizer of openvino-genai."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, folder: Path) -> _GraphTokenizer | None:
        """Opens the tokenizer's graph; None if there is none, or no openvino-genai."""
        if not (folder / TOKENIZER).is_file():
            return None
        try:
            import openvino_genai
        except ImportError:
            return None
        return cls(openvino_genai.Tokenizer(str(folder)))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        return ids


def _last_only(graph: Any) -> Any:
    """Returns a graph that computes its head for the last token only, if the product of the head is found."""
    import openvino.opset13 as ops

    node = graph.output("logits").get_node().input_value(0).get_node()
    for _ in range(HEAD_DEPTH):
        if node.get_type_name() == "MatMul":
            states = node.input_value(0)
            if states.get_partial_shape().rank.get_length() == 3:
                last = ops.gather(states, ops.constant(np.array([-1], np.int32)), ops.constant(np.int32(1)))
                node.input(0).replace_source_output(last.output(0))
                graph.validate_nodes_and_infer_types()
            break
        if not node.get_input_size():
            break
        node = node.input_value(0).get_node()
    return graph


def _precision(graph: Any) -> str:
    """Returns the precision of most of the weights."""
    counts: Counter[str] = Counter()
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1:
            name = NAMES.get(node.get_element_type().get_type_name())
            if name:
                counts[name] += int(np.prod(node.shape))
    return counts.most_common(1)[0][0] if counts else "float32"


def _versions() -> str:
    found = f"openvino {version('openvino')}"
    try:
        return f"{found} + openvino-genai {version('openvino-genai')}"
    except PackageNotFoundError:
        return found


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
