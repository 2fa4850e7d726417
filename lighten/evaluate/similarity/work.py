"""Computes embeddings, and writes them."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lighten.errors import Failure
from lighten.evaluate.paired import VALUES
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_quality
from lighten.evaluate.runtimes.texts import Reader, TextRuntime, Texts
from lighten.evaluate.similarity.settings import EMBEDDINGS, Similarity
from lighten.evaluate.stored_result import Result
from lighten.model.pooling import takes_first
from lighten.step import Report


def measure(request: Request[Similarity], report: Report) -> Result:
    """Returns what ran the model. Writes every embedding."""
    settings = request.settings
    runtime = cast(TextRuntime, for_quality(request))
    reader, first = Reader(runtime.folder, runtime.context), takes_first(request.tokenizer_file)
    texts = settings.sentences()
    found = []
    for start in range(0, len(texts), settings.batch):
        read = reader.read(texts[start : start + settings.batch])
        found.append(pooled(runtime.states(read), read, first=first))
        report(min(start + settings.batch, len(texts)), len(texts), "")
    vectors = np.concatenate(found)
    if not np.isfinite(vectors).all():
        raise Failure("the model gives states that are not finite numbers: it is broken, or its arithmetic overflows")
    save_file({EMBEDDINGS: vectors}, request.out / VALUES)
    return Result(warnings=[]).having(**facts(runtime))


def pooled(states: NDArray[np.float32], texts: Texts, *, first: bool) -> NDArray[np.float32]:
    """Returns the embeddings `[texts, hidden]` of states `[texts, longest, hidden]`: means, or the first states."""
    if first:
        return np.ascontiguousarray(states[:, 0])
    mask = texts.mask[:, :, None].astype(np.float32)
    mean: NDArray[np.float32] = (states * mask).sum(1) / mask.sum(1)
    return mean
