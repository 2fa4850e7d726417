"""Measures perplexity, and writes its values."""

from __future__ import annotations

from safetensors.numpy import save_file

from lighten.evaluate.paired import VALUES
from lighten.evaluate.perplexity import chunks, lm_eval
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_quality, other_vocabulary, renderer_of
from lighten.evaluate.runtimes.choose import open_tokenizer
from lighten.evaluate.stored_result import PerplexityResult
from lighten.step import Report


def measure(request: Request[Perplexity], report: Report) -> PerplexityResult:
    """Returns perplexity, divergence and their conditions. Writes values and, if asked, hidden states."""
    settings = request.settings
    other = other_vocabulary(request)
    runtime = for_quality(request)
    reference = None if other else request.reference
    if reference and not (reference.measurement / chunks.HIDDEN).is_file():
        reference = None  # its own measurement says why
    tokenizer = open_tokenizer(request.model if other else request.tokenizer)
    render = None if settings.data == "builtin" else renderer_of(request.tokenizer)
    if settings.protocol == "lm-eval":
        measured = lm_eval.measure(runtime, tokenizer, settings, report, render)
    else:
        measured = chunks.measure(
            runtime,
            tokenizer,
            settings,
            report,
            reference=(reference.measurement, reference.model) if reference else None,
            hidden_of=request.file if request.save_hidden else None,
            render=render,
        )
    save_file(measured.values, request.out / VALUES)
    if measured.hidden is not None:
        save_file({"hidden": measured.hidden}, request.out / chunks.HIDDEN)
    found = measured.result.perplexity
    whose = "own" if other or request.own_tokenizer else "the baseline's"
    found = found.model_copy(update={"protocol": {**found.protocol, "tokenizer": whose}})
    return measured.result.having(perplexity=found, **({"vocabulary": other} if other else {}), **facts(runtime))
