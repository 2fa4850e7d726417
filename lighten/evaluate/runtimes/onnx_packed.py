"""Many questions in one run of an ONNX graph, whose attention gets a mask: for each token, the tokens that it sees.

The operator GroupQueryAttention has inputs for a mask and for positions that exported graphs leave free. With these,
the questions of a batch are one row of tokens, as long as no question sees another. Weights and operators stay the
exported ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighten.evaluate.runtimes.batches import Layout, Row, read_scores
from lighten.evaluate.runtimes.runtime import Question, Score
from lighten.model.onnx_source import KEY

ATTENTION, POSITIONS, MASK, WANTED = "GroupQueryAttention", "position_ids", "attention_bias", "wanted_rows"
POSITIONS_AT, MASK_AT = 9, 10
"""Places of its optional inputs."""
PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")
HEAD_DEPTH = 8
DOUBT = 0.02
"""Nats per token by which rounding may make a packed question differ from one that runs alone."""


class Packed:
    """A session of a graph that takes a row of questions."""

    def __init__(self, session: Any, window: int, cache: Callable[[int], dict[str, Any]]) -> None:
        """Takes a session of a graph of `packable` and its window; `cache(n)` returns a cache of n tokens, all 0."""
        self._session = session
        self._inputs = {each.name: each for each in session.get_inputs()}
        self._window = window
        self._cache = cache

    def takes(self, questions: Sequence[Question]) -> bool:
        """Returns whether questions fit in a row. A window of the attention counts places of the row."""
        return not self._window or sum(question.packed for question in questions) < self._window

    def score(self, layouts: list[Layout]) -> list[list[Score]]:
        """Returns the scores of all endings.

        The row follows a cache of one token that no token sees, because the operator takes positions for every token
        only after a cache.
        """
        row = Row(layouts)
        return read_scores(self._run(row.ids, row.positions, row.sees, row.wanted, past=1), layouts)

    def agrees(self, vocab: int) -> bool:
        """Returns whether an ending has the same score in a row and alone, unmasked. This behaviour is undocumented."""
        ids = np.random.default_rng(0).integers(0, vocab, 28).tolist()
        question = Question(ids[:12], [ids[12:20], ids[20:]])
        ending = question.endings[-1]
        alone = Layout(Question(question.context, [ending]))
        size = len(alone.ids)
        logits = self._run(alone.ids, np.arange(size), np.tril(np.ones((size, size), np.bool_)), alone.wanted, past=0)
        expected, found = read_scores(logits, [alone])[0][0], self.score([Layout(question)])[0][-1]
        return abs(found.logprob - expected.logprob) <= DOUBT * len(ending)

    def _run(self, ids: Any, positions: Any, sees: Any, wanted: Any, past: int) -> Any:
        """Returns the logits of the wanted rows, `[rows, vocab]`."""
        size = len(ids)
        mask = np.zeros((1, 1, size, past + size), _type(self._inputs[MASK]))
        mask[0, 0, :, past:][~sees] = mask[..., :past] = np.finfo(mask.dtype).min / 2
        feed = {"input_ids": ids[None], POSITIONS: positions[None], MASK: mask, WANTED: wanted}
        feed |= {"attention_mask": np.ones((1, past + size)), **self._cache(past)}
        typed = {name: feed[name].astype(_type(each), copy=False) for name, each in self._inputs.items()}
        return self._session.run(["logits"], typed)[0][0].astype(np.float32, copy=False)


def packable(path: Path) -> tuple[bytes, int] | None:
    """Returns a graph with inputs for positions, mask and wanted rows, and the maximum number of tokens that it sees.

    None if its attention has no place for them. 0 tokens if it sees all.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = (model := onnx.load(path, load_external_data=False)).graph
    layers = [node for node in graph.node if node.op_type == ATTENTION]
    taken = {each.name: each for each in graph.input}
    keys = [name for name in taken if name.startswith(KEY) and name.endswith(".key")]
    head = _head(graph)
    if not layers or len(layers) != len(keys) or head is None or MASK in taken:
        return None
    if any(_set(node, MASK_AT) or _set(node, POSITIONS_AT) not in ("", POSITIONS) for node in layers):
        return None
    kind = taken[keys[0]].type.tensor_type.elem_type
    for node in layers:
        node.input.extend([""] * (MASK_AT + 1 - len(node.input)))
        node.input[POSITIONS_AT], node.input[MASK_AT] = POSITIONS, MASK
    place = list(graph.node).index(head)
    graph.node.insert(place, helper.make_node("Gather", [head.input[0], WANTED], [f"{WANTED}_states"], axis=1))
    head.input[0] = f"{WANTED}_states"
    if POSITIONS not in taken:
        graph.input.append(helper.make_tensor_value_info(POSITIONS, TensorProto.INT64, [1, "row"]))
    graph.input.append(helper.make_tensor_value_info(MASK, kind, [1, 1, "row", "seen"]))
    graph.input.append(helper.make_tensor_value_info(WANTED, TensorProto.INT64, ["wanted"]))
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    return model.SerializeToString(), min((each for each in map(_window, layers) if each > 0), default=0)


def _head(graph: Any) -> Any:
    """Returns the matrix product that makes the logits. Operators after it may only scale or convert."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get("logits")
    for _ in range(HEAD_DEPTH):
        if node is None or node.op_type in PRODUCTS:
            return node
        node = makers.get(node.input[0]) if node.input else None
    return None


def _set(node: Any, place: int) -> str:
    return str(node.input[place]) if place < len(node.input) else ""


def _window(node: Any) -> int:
    return next((int(each.i) for each in node.attribute if each.name == "local_window_size"), -1)


def _type(declared: Any) -> Any:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}.get(
        declared.type, np.int64
    )
