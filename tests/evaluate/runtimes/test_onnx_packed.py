from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.onnx import OnnxRuntime
from lighten.evaluate.runtimes.onnx_packed import packable
from lighten.evaluate.runtimes.runtime import Question
from lighten.step import silent
from tests.evaluate.conftest import score_alone
from tests.evaluate.runtimes.test_runtimes import questions

Tiny = Callable[..., Path]
ToOnnx = Callable[..., Path]


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-3), ("int4", 0.2)])
def test_a_row_of_questions_scores_them_as_if_alone(
    tiny: Tiny, to_onnx: ToOnnx, precision: str, rounding: float
) -> None:
    runtime = open_runtime(to_onnx(tiny(), graph="genai", precision=precision))
    assert isinstance(runtime, OnnxRuntime)
    assert runtime._packed is not None
    asked = questions(12)
    for question, found in zip(asked, runtime.choose_many(asked, silent), strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=rounding)


def test_a_graph_without_the_operator_is_left_alone(tiny: Tiny, to_onnx: ToOnnx) -> None:
    folder = to_onnx(tiny(), graph="plain", precision="fp32")
    assert packable(folder / "model.onnx") is None
    assert open_runtime(folder)._packed is None  # type: ignore[attr-defined]


def test_no_row_is_longer_than_the_window_of_the_attention(tiny: Tiny, to_onnx: ToOnnx, tmp_path: Path) -> None:
    exported = to_onnx(tiny(), graph="genai", precision="fp32")
    model = onnx.load(exported / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = 40
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "genai_config.json").write_text((exported / "genai_config.json").read_text())
    runtime = open_runtime(tmp_path)
    assert isinstance(runtime, OnnxRuntime)
    assert runtime._packed is not None
    short, long = Question(list(range(3, 13)), [[20, 21], [22]]), Question(list(range(3, 43)), [[20, 21], [22]])
    assert runtime._packed.takes([short])
    assert not runtime._packed.takes([short] * 4)
    for question, found in zip([short, long], runtime.choose_many([short, long], silent), strict=True):
        alone = [score_alone(runtime, question.context, ending) for ending in question.endings]
        assert [score.logprob for score in found] == pytest.approx(alone, abs=1e-3)


def test_an_attention_that_counts_positions_otherwise_is_noticed(tiny: Tiny, to_onnx: ToOnnx) -> None:
    runtime = open_runtime(to_onnx(tiny(), graph="genai", precision="fp32"))
    assert isinstance(runtime, OnnxRuntime)
    packed = runtime._packed
    assert packed is not None
    whole = packed._run
    packed._run = lambda ids, positions, *rest, **named: whole(ids, np.arange(len(ids)), *rest, **named)  # type: ignore[method-assign]
    assert not packed.agrees(runtime.vocab)
