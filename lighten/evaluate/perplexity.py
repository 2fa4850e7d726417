"""Perplexity of a text, and how far the next-token distributions moved from a reference's.

The text is tokenized once, by one tokenizer for all variants, and cut into chunks that do not overlap; every
position of a chunk but the first is scored given the ones before it in the chunk.

The reference's full distributions would take `vocab` numbers per token. What enters its head takes `hidden`
numbers, and one product with the head's weight gives the same logits again, so that is what is stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lighten.data.text import digest, load_text
from lighten.errors import Failure, RequestError
from lighten.evaluate import rows
from lighten.evaluate.head import Head
from lighten.evaluate.runtimes import Floats, Ids, Runtime, Tokenizer
from lighten.evaluate.settings import Perplexity
from lighten.stage import Report

HIDDEN = "hidden.safetensors"
RESULT = "result.json"
METHOD = (
    "exp of the mean negative log-likelihood of every position but the first of each chunk, given the positions "
    "before it in the chunk; chunks do not overlap, the rest of the text is dropped; stderr by the delta method over "
    "chunk means"
)
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative to the largest logit: how far a product in float32 may be from the model's own, in its arithmetic."""


@dataclass(frozen=True)
class Measured:
    """What a perplexity measurement found: its aggregates, and the values of every scored position."""

    result: dict[str, Any]
    values: dict[str, NDArray[Any]]
    """`nll [chunks, length - 1]`; with a reference also `kl` and `top1` (1 where the most likely token is the same)."""
    hidden: Floats | None
    """What entered the head, `[chunks, length, hidden]`, if it was asked for."""


def cut(ids: list[int], length: int, samples: int | None, bos: int | None) -> Ids:
    """Returns the chunks `[chunks, length]` of a text; the first id of each is `bos`, if there is one.

    Raises:
        RequestError: the text is shorter than one chunk.
    """
    stride = length if bos is None else length - 1
    count = len(ids) // stride
    if not count:
        raise RequestError(f"the text has {len(ids)} tokens, fewer than one chunk of {length}: set a smaller `length`")
    count = min(count, samples or count)
    chunks = np.array(ids[: count * stride], dtype=np.int64).reshape(count, stride)
    return chunks if bos is None else np.insert(chunks, 0, bos, axis=1)


def summarize(nll: NDArray[np.floating[Any]]) -> tuple[float, float | None]:
    """Returns perplexity and its standard error from `nll [chunks, positions]`.

    Tokens of one chunk are not independent, so the chunk is the unit of the error; None for a single chunk.
    """
    means = nll.astype(np.float64).mean(axis=1)
    value = math.exp(means.mean())
    if len(means) < 2:
        return value, None
    return value, value * float(means.std(ddof=1)) / math.sqrt(len(means))


class Reference:
    """The baseline's perplexity measurement, from which its next-token distributions are computed again."""

    def __init__(self, measurement: Path, model: Path, ids: Ids) -> None:
        """Opens the measurement.

        Raises:
            Failure: it was taken on other tokens, or cannot be read.
        """
        try:
            protocol = json.loads((measurement / RESULT).read_text(encoding="utf-8"))["perplexity"]["protocol"]
            self._hidden = safe_open(measurement / HIDDEN, framework="numpy").get_slice("hidden")  # type: ignore[no-untyped-call]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise Failure(f"{measurement} is not a perplexity measurement with hidden states: {error}") from error
        if protocol["ids_sha256"] != hash_ids(ids):
            raise Failure(f"{measurement} was taken on other tokens than these: measure both with the same tokenizer")
        self._head = Head(model)

    def logits(self, chunk: int) -> Floats:
        """Returns the reference's logits `[length, vocab]` of one chunk; valid until the next call."""
        return self._head.logits(self._hidden[chunk])


def measure(
    runtime: Runtime,
    tokenizer: Tokenizer,
    settings: Perplexity,
    report: Report,
    *,
    reference: tuple[Path, Path] | None = None,
    hidden_of: Path | None = None,
) -> Measured:
    """Measures a model.

    Args:
        runtime: the loaded model.
        tokenizer: gives the ids, whatever the model's own tokenizer is.
        settings: text, length and number of chunks.
        report: called after every chunk.
        reference: directory of the baseline's measurement and of the baseline.
        hidden_of: directory of the model, if what enters its head is to be kept for use as a reference.
    """
    text = load_text(settings.data, "perplexity")
    report(0, 1, "tokenizing")
    own = tokenizer.encode(text)
    ids = cut(own, settings.length, settings.samples, tokenizer.bos)
    if ids.max() >= runtime.vocab:
        raise Failure(f"the tokenizer gives the id {ids.max()}, but the model has a vocabulary of {runtime.vocab}")
    against = Reference(*reference, ids) if reference else None
    shape = (len(ids), settings.length - 1)
    nll, kl, same = np.empty(shape), np.empty(shape), np.empty(shape, dtype=np.bool_)
    kept: list[Floats] = []
    warnings = []
    start = time.monotonic()
    report(0, len(ids), "")
    for number, chunk in enumerate(ids):
        logits = runtime.logits(chunk)
        if number == 0 and hidden_of and (why := unfit(hidden_of, runtime, logits)):
            warnings.append(f"divergence from this model cannot be measured: {why}")
            hidden_of = None
        if hidden_of and (hidden := runtime.hidden()) is not None:
            kept.append(hidden.copy())
        nll[number] = -rows.token_logprobs(logits[:-1], chunk[1:])[0]
        if not np.isfinite(nll[number]).all():
            raise Failure("the model's logits are not finite numbers: it is broken, or its arithmetic overflows")
        if against:
            kl[number], same[number] = rows.divergence(against.logits(number)[:-1], logits[:-1])
        rate = (number + 1) * settings.length / (time.monotonic() - start)
        report(number + 1, len(ids), f"{rate:.0f} tok/s")
    value, stderr = summarize(nll)
    protocol = {
        "data": settings.data,
        "data_sha256": digest(text),
        "ids_sha256": hash_ids(ids),
        "length": settings.length,
        "stride": settings.length if tokenizer.bos is None else settings.length - 1,
        "bos": tokenizer.bos is not None,
        "dtype": runtime.dtype,
        "chunks": len(ids),
        "method": METHOD,
    }
    result: dict[str, Any] = {
        "perplexity": {"value": value, "stderr": stderr, "tokens": int(nll.size), "protocol": protocol},
        "divergence": None,
        "tokenizer_match": runtime.encode(text) == own,
        "warnings": warnings,
    }
    values: dict[str, NDArray[Any]] = {"nll": nll.astype(np.float32)}
    if against:
        kl_p99 = float(np.percentile(kl, 99))
        result["divergence"] = {"kl_mean": float(kl.mean()), "kl_p99": kl_p99, "top1_agreement": float(same.mean())}
        values |= {"kl": kl.astype(np.float32), "top1": same.astype(np.uint8)}
    return Measured(result, values, np.stack(kept) if kept else None)


def unfit(model: Path, runtime: Runtime, logits: Floats) -> str | None:
    """Returns why the model cannot be a reference, or None if its head gives its last `logits` again."""
    hidden = runtime.hidden()
    if hidden is None:
        return f"{runtime.name} does not show what enters the head of a model"
    try:
        again = Head(model).logits(hidden)
    except RequestError as error:
        return str(error)
    if again.shape != logits.shape:
        return f"its head has {again.shape[1]} rows for {logits.shape[1]} logits"
    gap = float(np.abs(again - logits).max() / np.abs(logits).max())
    return f"its logits are not a product of its head ({gap:.1e} off)" if gap > TOLERANCE[runtime.dtype] else None


def hash_ids(ids: Ids) -> str:
    """Returns the SHA-256 of the ids of a text, as the protocol has it."""
    return hashlib.sha256(ids.tobytes()).hexdigest()
