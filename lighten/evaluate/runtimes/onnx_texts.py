"""Encoders and sequence-to-sequence models as plain ONNX graphs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import Failure, RequestError, missing_extra
from lighten.evaluate import machine
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.runtime import Capability, Floats, Ids
from lighten.evaluate.runtimes.texts import Reader, Texts
from lighten.facts import Task
from lighten.model.answers import Rules, greedy
from lighten.model.onnx_source import ENCODER, facts, read_graph

TYPES = {1: np.float32, 10: np.float16, 7: np.int64, 6: np.int32}
"""numpy's types of ONNX's numbers of types."""


class OnnxTexts(Defaults):
    """The graphs of a model that reads whole texts. See `TextRuntime` for the methods."""

    name = "onnxruntime"

    def __init__(self, path: Path, task: Task) -> None:
        """Reads the graphs beside `path`.

        Raises:
            RequestError: onnxruntime is missing, or the graphs are of another kind.
            Failure: a file is missing or damaged.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_extra("onnx", "onnxruntime", "running an ONNX model") from error
        self._library = onnxruntime
        self.folder, self.device = path.parent, "cpu"
        first = self.folder / ENCODER if task == "seq2seq" else path
        files = [first, path] if task == "seq2seq" else [first]
        if missing := [file.name for file in files if not file.is_file()]:
            raise Failure(f"{self.folder} lacks {missing[0]}: export the model again")
        self.graphs = {file.name: read_graph(file) for file in files}
        graph = self.graphs[path.name]
        self.dtype = graph.precision
        self.detail = f"onnxruntime {version('onnxruntime')}"
        known = facts(path.parent)
        self.vocab, self.context = known.vocab, known.context
        able: dict[Capability, bool] = {
            "translates": task == "seq2seq" and "logits" in graph.outputs,
            "fills": task == "masked" and "logits" in graph.outputs,
            "encodes": task != "seq2seq" and "last_hidden_state" in graph.outputs,
        }
        self.capabilities = frozenset(name for name, can in able.items() if can)
        if not self.capabilities:
            raise RequestError(f"{path} gives {', '.join(graph.outputs[:3])}: not a model that can be measured here")
        self._sessions = {file.name: self._open(file) for file in files}
        self._first, self._main = first.name, path.name
        self._rules = Rules.of(self.folder) if task == "seq2seq" else None
        self._reader: Reader | None = None

    def _open(self, file: Path) -> Any:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = machine.cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            return self._library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions share no base class
            reason = " ".join(str(error).split())[:400]
            raise Failure(f"onnxruntime cannot load {file}: {reason}") from error

    def _run(self, file: str, feed: dict[str, Any], outputs: list[str] | None = None) -> dict[str, Any]:
        session = self._sessions[file]
        names = outputs or self.graphs[file].outputs
        taken = {name: feed[name] for name in self.graphs[file].inputs if name in feed}
        try:
            return dict(zip(names, session.run(names, taken), strict=True))
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise Failure(f"onnxruntime failed in {self.folder / file}: {reason}") from error

    def translate(self, texts: Texts, most: int) -> list[list[int]]:
        """See `TextRuntime`."""
        assert self._rules
        inputs = self.graphs[self._main].inputs
        feed = self._run(self._first, {"input_ids": texts.ids, "attention_mask": texts.mask})
        feed |= {"encoder_attention_mask": texts.mask}
        for name, each in inputs.items():
            if name.startswith("past_key_values."):
                empty = (len(texts.ids), each.shape[1], 0, each.shape[3])
                feed[name] = np.zeros(empty, TYPES[each.kind])

        def step(ids: Ids) -> Floats:
            found = self._run(self._main, {**feed, "input_ids": ids})
            for name, value in found.items():
                feed[name.replace("present.", "past_key_values.")] = value
            last: Floats = found["logits"][:, -1]
            return last

        return greedy(step, len(texts.ids), self._rules, most)

    def _whole(self, texts: Texts, output: str) -> Floats:
        feed = {"input_ids": texts.ids, "attention_mask": texts.mask, "token_type_ids": np.zeros_like(texts.ids)}
        found: Floats = self._run(self._main, feed, [output])[output].astype(np.float32, copy=False)
        return found

    def states(self, texts: Texts) -> Floats:
        """See `TextRuntime`."""
        return self._whole(texts, "last_hidden_state")

    def fill(self, texts: Texts) -> Floats:
        """See `TextRuntime`."""
        return self._whole(texts, "logits")

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        self._reader = self._reader or Reader(self.folder, None)
        return [int(each) for each in self._reader.read([text]).ids[0]]

    def close(self) -> None:
        """See `Runtime`."""
        self._sessions.clear()
