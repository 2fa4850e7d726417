"""Measures accuracy, and writes the answers."""

from __future__ import annotations

from functools import partial

from safetensors.numpy import save_file

from lighten.evaluate.accuracy import scoring
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.paired import VALUES
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_quality, other_vocabulary
from lighten.evaluate.runtimes.choose import open_tokenizer, words_of
from lighten.evaluate.stored_result import AccuracyResult
from lighten.step import Report


def measure(request: Request[Accuracy], report: Report) -> AccuracyResult:
    """Returns the accuracy, and whether the model's own tokenizer reads the tasks alike. Writes every answer."""
    settings, scorer = request.settings, scoring.measure
    if settings.harness:
        from lighten.evaluate.accuracy.harness import measure as harness  # imports lm-eval, an extra
        from lighten.evaluate.accuracy.harness.chat import Chat

        chat = Chat(words_of(request.model), settings.system) if settings.chat else None
        scorer = partial(harness.measure, chat=chat)
    other = other_vocabulary(request)
    runtime = for_quality(request)
    tokenizer = open_tokenizer(request.model if other else request.tokenizer)
    measured = scorer(runtime, tokenizer, settings, report)
    save_file(measured.values, request.out / VALUES)
    return measured.result.having(**({"vocabulary": other} if other else {}), **facts(runtime))
