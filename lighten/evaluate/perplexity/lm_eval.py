"""Perplexity of documents by lm-eval's protocol: rolling log-likelihood, by word and by byte."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from lighten.data.origin import text_name
from lighten.data.text import Render, digest, load_documents
from lighten.errors import Failure
from lighten.evaluate.perplexity import protocols
from lighten.evaluate.perplexity.chunks import Measured, hash_ids
from lighten.evaluate.perplexity.rolling import loglikelihoods
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes.runtime import Runtime, Tokenizer
from lighten.evaluate.stored_result import PerplexityResult
from lighten.results import measured
from lighten.step import Report


def count_words(text: str) -> int:
    """Returns lm-eval's number of words: the pieces between runs of white space."""
    return len(re.split(r"\s+", text))


def measure(
    runtime: Runtime, tokenizer: Tokenizer, settings: Perplexity, report: Report, render: Render | None = None
) -> Measured:
    """Measures a model; values are `nll [documents]` (sums) and `words [documents]`.

    Raises:
        RequestError: windows longer than the model's context.
        Failure: the model is broken, has another vocabulary, or its tokenizer has no token for an empty context.
    """
    settings.check_length(runtime.context, "this model")
    length = settings.tokens(runtime.context)
    documents = load_documents(settings.data, "perplexity", render)[: settings.samples]
    report(0, 1, "tokenizing")
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    own = [tokenizer.encode(text) for text in documents]
    ids = [start + each for each in own]
    if tokenizer.prefix is None:
        raise Failure("the tokenizer has no beginning and no end of text: lm-eval's protocol needs one of them")
    if (largest := max(max(each, default=0) for each in ids)) >= runtime.vocab:
        raise Failure(f"the tokenizer gives the id {largest}, but the model has a vocabulary of {runtime.vocab}")
    nll = -np.array(loglikelihoods(runtime, ids, tokenizer.prefix, length, report))
    if not np.isfinite(nll).all():
        raise Failure("the model's logits are not finite numbers: it is broken, or its arithmetic overflows")
    words = np.array([count_words(text) for text in documents])
    letters = sum(len(text.encode()) for text in documents)
    tokens = sum(map(len, ids))
    value, stderr = by_word(nll, words)
    total = float(nll.sum())
    joined = "\n\n".join(documents)
    protocol: measured.Free = {
        "name": settings.protocol,
        "data": text_name(settings.data),
        "data_sha256": digest(joined),
        "ids_sha256": hash_ids(np.array([token for each in ids for token in [tokenizer.prefix, *each]])),
        "length": length,
        "bos": tokenizer.bos is not None,
        "dtype": runtime.dtype,
        "documents": len(documents),
        "unit": "word",
        "method": protocols.METHODS[settings.protocol],
    }
    levels = measured.Levels(
        word=value,
        byte=math.exp(total / letters),
        token=math.exp(total / tokens),
        bits_per_byte=total / letters / math.log(2),
    )
    found = measured.Perplexity(value=value, stderr=stderr, tokens=tokens, levels=levels, protocol=protocol)
    match = [runtime.encode(text) for text in documents] == own
    result = PerplexityResult(perplexity=found, divergence=None, tokenizer_match=match, warnings=[])
    return Measured(result, {"nll": nll, "words": words}, None)


def by_word(nll: np.ndarray[Any, np.dtype[Any]], words: np.ndarray[Any, np.dtype[Any]]) -> tuple[float, float | None]:
    """Returns perplexity by word and its standard error (ratio of sums); None as error of a single document."""
    rate = float(nll.sum() / words.sum())
    value, n = math.exp(rate), len(nll)
    if n < 2:
        return value, None
    spread = math.sqrt(float(((nll - rate * words) ** 2).sum()) * n / (n - 1)) / float(words.sum())
    return value, value * spread
