"""Hides tokens, and asks for them."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lighten.errors import Failure, RequestError
from lighten.evaluate.accuracy.scoring import wilson
from lighten.evaluate.masked.settings import Masked
from lighten.evaluate.paired import VALUES
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_quality
from lighten.evaluate.runtimes.rows import token_logprobs
from lighten.evaluate.runtimes.texts import Reader, TextRuntime, Texts
from lighten.evaluate.stored_result import MaskedResult
from lighten.results import measured
from lighten.step import Report


def measure(request: Request[Masked], report: Report) -> MaskedResult:
    """Returns the share of hidden tokens that the model finds. Writes every answer.

    Raises:
        RequestError: the tokenizer has no token for a gap.
    """
    settings = request.settings
    runtime = cast(TextRuntime, for_quality(request))
    reader = Reader(runtime.folder, runtime.context)
    if reader.tokenizer.mask_token_id is None:
        raise RequestError(f"the tokenizer in {runtime.folder} has no token for a gap: name one as mask_token")
    special = np.array(sorted(reader.tokenizer.all_special_ids))
    chance = np.random.default_rng(settings.seed)
    texts = settings.sentences()
    right, losses = [], []
    for start in range(0, len(texts), settings.batch):
        read = reader.read(texts[start : start + settings.batch])
        places = hide(read, special, settings.hidden, chance)
        ids = np.where(places, reader.tokenizer.mask_token_id, read.ids)
        logits = runtime.fill(Texts(ids, read.mask))[places]
        right.append(logits.argmax(-1) == read.ids[places])
        losses.append(-token_logprobs(logits, read.ids[places])[0])
        report(min(start + settings.batch, len(texts)), len(texts), "")
    found, loss = np.concatenate(right), np.concatenate(losses)
    if not np.isfinite(loss).all():
        raise Failure("the model gives logits that are not finite numbers: it is broken, or its arithmetic overflows")
    save_file({"right": found, "loss": loss.astype(np.float32)}, request.out / VALUES)
    count = int(found.sum())
    result = measured.Masked(
        acc=count / len(found), n=len(found), ci95=wilson(count, len(found)), loss=float(loss.mean())
    )
    return MaskedResult(masked=result).having(**facts(runtime))


def hide(texts: Texts, special: NDArray[np.int64], share: float, chance: np.random.Generator) -> NDArray[np.bool_]:
    """Returns which tokens are hidden, `[texts, longest]`: a share of those that are not special, at least one."""
    able = (texts.mask > 0) & ~np.isin(texts.ids, special)
    order = np.where(able, chance.random(able.shape), 2.0)
    counts = np.maximum(1, np.round(share * able.sum(1)).astype(int))
    ranks = order.argsort(1).argsort(1)
    places: NDArray[np.bool_] = (ranks < counts[:, None]) & able
    return places
