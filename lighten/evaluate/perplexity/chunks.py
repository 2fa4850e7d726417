"""Perplexity of a text, and how far the next-token distributions moved from a reference's.

One tokenizer tokenizes the text once for all variants. The tokens are cut into chunks by a protocol. Each scored
position is predicted from the positions before it in the chunk.

The reference's full distributions would take `vocab` numbers per token. The inputs of its head take `hidden` numbers,
and one product with the head's weight gives the same logits again. So the inputs are stored.
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

from lighten.data.origin import text_name
from lighten.data.text import Render, digest, load_text
from lighten.errors import Failure, RequestError
from lighten.evaluate.perplexity import protocols
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes import rows
from lighten.evaluate.runtimes.head import Head
from lighten.evaluate.runtimes.runtime import Floats, Ids, Question, Runtime, Tokenizer
from lighten.evaluate.stored_result import PerplexityResult
from lighten.results import measured
from lighten.step import Report

HIDDEN = "hidden.safetensors"
RESULT = "result.json"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Allowed difference of a float32 product from the model's own, in its arithmetic, relative to the largest logit."""


@dataclass(frozen=True)
class Measured:
    """The results of a perplexity measurement: its aggregates, and the values of every scored position."""

    result: PerplexityResult
    values: dict[str, NDArray[Any]]
    """`nll [chunks, scored positions]`; with a reference also `kl` and `top1` (1 where the likeliest token is its)."""
    hidden: Floats | None
    """Inputs of the head, `[chunks, length, hidden]`, if asked for."""


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
        self.model = model
        """Directory of the baseline."""
        self._head: Head | None = None

    def logits(self, chunk: int) -> Floats:
        """Returns the reference's logits `[length, vocab]` of one chunk; valid until the next call."""
        if self._head is None:
            self._head = Head(self.model)
        return self._head.logits(self._hidden[chunk])

    def hidden(self, chunks: slice) -> Floats:
        """Returns the inputs of the reference's head, `[chunks, length, hidden]`."""
        found: Floats = self._hidden[chunks]
        return found


def measure(
    runtime: Runtime,
    tokenizer: Tokenizer,
    settings: Perplexity,
    report: Report,
    *,
    reference: tuple[Path, Path] | None = None,
    hidden_of: Path | None = None,
    render: Render | None = None,
) -> Measured:
    """Measures a model.

    Args:
        runtime: the loaded model.
        tokenizer: gives the ids, whatever the model's own tokenizer is.
        settings: text, protocol, length and number of chunks.
        report: called after every chunk.
        reference: directory of the baseline's measurement and of the baseline.
        hidden_of: directory of the model, if what enters its head is to be kept for use as a reference.
        render: writes the turns of conversations, if the text holds any.

    Raises:
        RequestError: chunks longer than the text or than the model's context.
        Failure: the model is broken, or has another vocabulary.
    """
    settings.check_length(runtime.context, "this model")
    text = protocols.prepare(load_text(settings.data, "perplexity", render), settings.protocol)
    report(0, 1, "tokenizing")
    own = tokenizer.encode(text)
    chunks = protocols.chunked(own, settings, tokenizer)
    ids, first = chunks.ids, chunks.first
    if ids.max() >= runtime.vocab:
        raise Failure(f"the tokenizer gives the id {ids.max()}, but the model has a vocabulary of {runtime.vocab}")
    shown = "logits" in runtime.capabilities
    against = Reference(*reference, ids) if reference and shown else None
    shape = (len(ids), ids.shape[1] - first)
    nll, kl, same = np.empty(shape), np.empty(shape), np.empty(shape, dtype=np.bool_)
    kept: list[Floats] = []
    warnings = []
    start = time.monotonic()
    report(0, len(ids), "")
    score = _scorer(runtime, ids, first, against, report)
    for number in range(0, len(ids), score.together):
        part = slice(number, min(number + score.together, len(ids)))
        if number == 0 and hidden_of and (why := _unfit(hidden_of, runtime, ids[0])):
            warnings.append(f"divergence from this model cannot be measured: {why}")
            hidden_of = None
        nll[part], kl[part], same[part], hidden = score(part)
        if hidden_of and hidden is not None:
            kept.append(hidden.copy())
        if not np.isfinite(nll[part]).all():
            raise Failure("the model's logits are not finite numbers: it is broken, or its arithmetic overflows")
        done = part.stop
        report(done, len(ids), f"{done * ids.shape[1] / (time.monotonic() - start):.0f} tok/s")
    value, stderr = summarize(nll)
    letters = scored_bytes(tokenizer, chunks)
    protocol: measured.Free = {
        "name": settings.protocol,
        "data": text_name(settings.data),
        "data_sha256": digest(text),
        "ids_sha256": hash_ids(ids),
        "length": settings.length,
        "stride": chunks.stride,
        "bos": chunks.bos,
        "dtype": runtime.dtype,
        "chunks": len(ids),
        "method": protocols.METHODS[settings.protocol],
        **({"within": settings.within, "chunks_of_text": chunks.of} if settings.within else {}),
    }
    found = measured.Perplexity(
        value=value,
        stderr=stderr,
        tokens=int(nll.size),
        bits_per_byte=float(nll.sum()) / letters / math.log(2) if letters else None,
        protocol=protocol,
    )
    divergence = None
    values: dict[str, NDArray[Any]] = {"nll": nll.astype(np.float32)}
    if against:
        kl_p99 = float(np.percentile(kl, 99))
        divergence = measured.Divergence(kl_mean=float(kl.mean()), kl_p99=kl_p99, top1_agreement=float(same.mean()))
        values |= {"kl": kl.astype(np.float32), "top1": same.astype(np.uint8)}
    match = runtime.encode(text) == own
    result = PerplexityResult(perplexity=found, divergence=divergence, tokenizer_match=match, warnings=warnings)
    return Measured(result, values, np.concatenate(kept) if kept else None)


class _Scorer:
    """Scores chunks one by one: logits in the processor's memory, statistics by numpy."""

    together = 1
    """Number of chunks that are computed at once."""

    def __init__(self, runtime: Runtime, ids: Ids, first: int, against: Reference | None) -> None:
        self.runtime, self.ids, self.first, self.against = runtime, ids, first, against

    def __call__(self, part: slice) -> tuple[Any, Any, Any, Floats | None]:
        """Returns NLL, KL and agreement of the scored positions of chunks, and the inputs of the head."""
        (chunk,) = self.ids[part]
        scored = slice(self.first - 1, -1)
        logits = self.runtime.logits(chunk)
        nll = -rows.token_logprobs(logits[scored], chunk[self.first :])[0]
        kl: NDArray[Any] = np.zeros(1)
        same: NDArray[Any] = np.ones(1, dtype=np.bool_)
        if self.against:
            kl, same = rows.divergence(self.against.logits(part.start)[scored], logits[scored])
        hidden = self.runtime.hidden()
        return nll, kl, same, None if hidden is None else hidden[None]


class _ByScores:
    """Scores chunks if a runtime gives no logits. A chunk's mean stands for each of its positions."""

    def __init__(self, runtime: Runtime, ids: Ids, first: int, report: Report) -> None:
        self.runtime, self.ids, self.first, self.report = runtime, ids, first, report
        self.together = runtime.parallel
        """Number of chunks that are computed at once."""

    def __call__(self, part: slice) -> tuple[Any, Any, Any, None]:
        """Returns the mean NLL of the scored positions of chunks, `[chunks, 1]`. Divergence is not known."""
        questions = [Question(chunk[: self.first], [chunk[self.first :]]) for chunk in self.ids[part].tolist()]
        found = self.runtime.choose_many(
            questions, lambda done, _, note: self.report(part.start + done, len(self.ids), note)
        )
        means = [-score.logprob / (self.ids.shape[1] - self.first) for (score,) in found]
        return np.array(means)[:, None], 0.0, True, None


def _scorer(runtime: Runtime, ids: Ids, first: int, against: Reference | None, report: Report) -> Any:
    """Returns the scorer of chunks: by logits, on the model's device if that is a GPU; or by scores."""
    if "logits" not in runtime.capabilities:
        return _ByScores(runtime, ids, first, report)
    if runtime.name == "torch" and runtime.device != "cpu":
        from lighten.evaluate.runtimes.device_rows import DeviceScorer

        return DeviceScorer(runtime, ids, first, against)
    return _Scorer(runtime, ids, first, against)


def scored_bytes(tokenizer: Tokenizer, chunks: protocols.Chunks) -> int:
    """Returns the bytes of text of the scored positions.

    A character that is split by the border of two chunks counts as a byte in each of them.
    """
    start = int(chunks.bos)

    def count(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, special=True).replace("\ufffd", "?").encode()) if ids else 0

    rows = [[int(each) for each in row] for row in chunks.ids]
    return sum(count(row[start:]) - count(row[start : chunks.first]) for row in rows)


def _unfit(model: Path, runtime: Runtime, chunk: Ids) -> str | None:
    if "logits" not in runtime.capabilities:
        return f"{runtime.name} does not give its logits"
    return unfit(model, runtime, runtime.logits(chunk))


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
    """Returns the SHA-256 of the ids of a text, as in the protocol."""
    return hashlib.sha256(ids.tobytes()).hexdigest()
