"""The places of a text where two models disagree most, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lighten.data.origin import text_name
from lighten.data.text import load_text
from lighten.errors import Failure, RequestError
from lighten.evaluate.paired import values
from lighten.evaluate.perplexity.chunks import hash_ids
from lighten.evaluate.perplexity.protocols import chunked
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes import rows
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.runtime import Floats, Ids, Runtime
from lighten.model.template import renderer
from lighten.process.isolate import share_cores
from lighten.step import Report

BEFORE, AFTER = 40, 12
"""Tokens of text that are shown around a place."""


def largest(payload: dict[str, Any], report: Report) -> list[dict[str, Any]]:
    """Returns the places with the largest divergence KL(first || second), in nats, largest first.

    Args:
        payload: `tokenizer` (path of the model whose tokenizer gives the ids), `config` (settings of the perplexity
            measurement whose text this is), `ids_sha256` (of its ids, or None), `count` (places to return), and
            either `stored` (a perplexity measurement of the second against the first) or `models` (paths of both),
            `device` and `trust_remote_code`.
        report: called as the work goes on.

    Returns:
        For each place `{kl, chunk, position, before, token, after}`, and where the models were run
        `first` and `second`: `{token, p, p_actual}`, what each finds most likely and how likely it finds the token
        that is there.

    Raises:
        Failure: the text is not the one that was measured.
    """
    settings = Perplexity(**payload["config"])
    tokenizer = open_tokenizer(Path(payload["tokenizer"]))
    text = load_text(settings.data, "perplexity", renderer(Path(payload["tokenizer"])))
    if settings.protocol != "lighten":
        raise RequestError(
            f"--tokens tells the places of lighten's own protocol, this perplexity is by {settings.protocol}"
        )
    ids = chunked(tokenizer.encode(text), settings, tokenizer).ids
    if payload.get("ids_sha256") not in (None, hash_ids(ids)):
        raise Failure(
            f"the text {text_name(settings.data)!r} is not the one that was measured: it has changed since, or moved"
        )
    pair = None
    if payload.get("stored"):
        kl = values(Path(payload["stored"]))["kl"]
    else:
        share_cores()
        trusted = payload.get("trust_remote_code", False)
        first, second = (
            open_runtime(Path(model), device=payload["device"], trust_remote_code=trusted)
            for model in payload["models"]
        )
        pair = first, second
        kl = _divergences(first, second, ids, report)
    worst = np.argsort(kl, axis=None)[::-1][: payload["count"]]
    places = [(int(chunk), int(at)) for chunk, at in zip(*np.unravel_index(worst, kl.shape), strict=True)]
    sides = _sides(pair, ids, places) if pair else {}
    found = []
    for chunk, at in places:
        row = [int(each) for each in ids[chunk]]
        place: dict[str, Any] = {"kl": float(kl[chunk, at]), "chunk": chunk, "position": at + 1}
        place["before"] = tokenizer.decode(row[max(0, at + 1 - BEFORE) : at + 1], special=True)
        place["token"] = tokenizer.decode([row[at + 1]], special=True)
        place["after"] = tokenizer.decode(row[at + 2 : at + 2 + AFTER], special=True)
        for name, (top, p, p_actual) in zip(("first", "second"), sides.get((chunk, at), ()), strict=False):
            place[name] = {"token": tokenizer.decode([top], special=True), "p": p, "p_actual": p_actual}
        found.append(place)
    return found


def _divergences(first: Runtime, second: Runtime, ids: Ids, report: Report) -> Floats:
    """Returns KL(first || second) `[chunks, length - 1]`."""
    if int(ids.max()) >= min(first.vocab, second.vocab):
        raise RequestError("the two do not have the same vocabulary: their tokens cannot be compared")
    kl = np.empty((len(ids), ids.shape[1] - 1), dtype=np.float32)
    for number, chunk in enumerate(ids):
        logits = first.logits(chunk)
        kl[number] = rows.divergence(logits[:-1], second.logits(chunk)[:-1])[0]
        report(number + 1, len(ids), "")
    return kl


def _sides(
    pair: tuple[Runtime, Runtime], ids: Ids, places: list[tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[int, float, float]]]:
    """Returns, for each place and model, the most likely token, its probability, and that of the actual token."""
    found: dict[tuple[int, int], list[tuple[int, float, float]]] = {place: [] for place in places}
    for number in sorted({chunk for chunk, _ in places}):
        for runtime in pair:
            logits = runtime.logits(ids[number])
            for chunk, at in places:
                if chunk == number:
                    row = logits[at].astype(np.float64)
                    p = np.exp(row - row.max())
                    p /= p.sum()
                    found[chunk, at].append((int(p.argmax()), float(p.max()), float(p[ids[number, at + 1]])))
    return found
