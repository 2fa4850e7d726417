"""The comparison for spreadsheets and data frames: every number as it was measured, a row for every variant."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from lighten.report import claims
from lighten.results.measured import Accuracy, Speed
from lighten.results.results import Results, Variant

Fields = Iterator[tuple[str, str | int | float | None]]
"""Columns: the name of each, and its value."""

FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]")
"""Characters that begin a formula, in full width too."""

HOW = ("attention", "compile", "cache", "draft")
"""Fields that distinguish two measurements of speed with the same batch and prompt."""


def csv_table(results: Results) -> str:
    """Returns RFC 4180 CSV: fractions as fractions, sizes in bytes, latencies in ms. Empty is not measured.

    The first columns are always there. Any further column is there if a variant has a value in it.
    """
    rows = [dict(_fields(results, variant)) for variant in results.variants]
    names = dict.fromkeys(name for row in rows for name in row)
    always = ("variant", "status", "error")
    used = [name for name in names if name in always or any(row.get(name) is not None for row in rows)] or [*always]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(map(_plain, used))
    writer.writerows([_plain(row.get(name)) for name in used] for row in rows)
    return text.getvalue()


def _plain(value: str | int | float | None) -> str | int | float | None:
    """Returns the text of a cell. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _fields(results: Results, v: Variant) -> Fields:
    yield "variant", v.name
    yield "status", v.status
    yield "error", v.error
    yield from (("format", v.format), ("runtime", v.runtime), ("device", v.device), ("params", v.params))
    yield from (("size_bytes", v.size_bytes), ("size_ratio", results.size_ratio(v)))
    yield "bits_per_weight", v.bits_per_weight
    for i, each in enumerate(v.perplexities):
        name = "perplexity" if i == 0 else f"perplexity {each.by}"
        yield from ((name, each.value), (f"{name} stderr", each.stderr), (f"{name} tokens", each.tokens))
        yield f"{name} protocol", each.by
        delta = results.perplexity_change(v, each.by)
        low, high = (delta.ci95 if delta else None) or (None, None)
        yield f"{name} change", delta.relative if delta else None
        yield from ((f"{name} change low", low), (f"{name} change high", high))
    yield from (("bits_per_byte", v.bits_per_byte), ("vocabulary", v.vocabulary))
    for name in ("kl_mean", "kl_p99", "top1_agreement"):
        yield name, getattr(v.divergence, name, None)
    for score in v.accuracy:
        yield from _accuracy(score)
    for i, speed in enumerate(v.speed):
        how = [str(value) for name in HOW if (value := getattr(speed, name, None))]
        yield from _speed(speed, "" if i == 0 else " ".join([f" batch {speed.batch} prompt {speed.prompt}", *how]))
    yield "decode_ratio", claims.decode_ratio(results, v)
    if v.memory:
        yield from (("peak_rss_bytes", v.memory.peak_rss_bytes), ("peak_vram_bytes", v.memory.peak_vram_bytes))
    if v.energy:
        yield "joules_per_token", v.energy.joules_per_token
    yield "key", v.key


def _accuracy(score: Accuracy) -> Fields:
    for name, value, interval in (
        ("acc", score.acc, score.ci95),
        ("acc_norm", score.acc_norm, score.ci95_norm),
    ):
        low, high = interval or (None, None)
        yield from (
            (f"{name} {score.task}", value),
            (f"{name} {score.task} low", low),
            (f"{name} {score.task} high", high),
        )
    yield f"n {score.task}", score.n
    for each in score.metrics:
        yield f"{each.task} {each.metric} {each.filter}", each.value


def _speed(speed: Speed, setting: str) -> Fields:
    if not setting:
        yield from (("batch", speed.batch), ("prompt", speed.prompt), ("generate", speed.generate))
    yield f"prefill_tok_s{setting}", speed.prefill_tok_s
    yield f"decode_tok_s{setting}", speed.decode_tok_s
    for name, latency in (("ttft_ms", speed.ttft_ms), ("token_ms", speed.token_ms)):
        for end in ("p50", "p95", "p99"):
            yield f"{name} {end}{setting}", getattr(latency, end) if latency else None
    yield f"spread{setting}", speed.spread
    yield from ((f"dtype{setting}", speed.dtype), (f"prefill_dtype{setting}", speed.prefill_dtype))
