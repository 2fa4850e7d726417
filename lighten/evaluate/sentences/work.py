"""Measures the speed of whole sentences, in the faster arithmetic."""

from __future__ import annotations

import time
from typing import cast

import numpy as np

from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_speed
from lighten.evaluate.runtimes.choose import served_in
from lighten.evaluate.runtimes.texts import Reader, TextRuntime
from lighten.evaluate.sentences.settings import Sentences
from lighten.evaluate.stored_result import SentencesResult
from lighten.process.isolate import peak_rss_bytes
from lighten.results import measured
from lighten.step import Report


def measure(request: Request[Sentences], report: Report) -> SentencesResult:
    """Returns a row for every size of a batch, and memory.

    A runtime that leaves the choice is measured in float32 too; the arithmetic with more sentences a second counts.
    """
    served = served_in(request.model, request.device)
    types = dict.fromkeys([served, "float32"] if served else [None])
    found = [_measured(request, dtype, report) for dtype in types]
    return max(found, key=lambda each: max(row.sentences_s for row in each.sentences))


def _measured(request: Request[Sentences], dtype: str | None, report: Report) -> SentencesResult:
    settings = request.settings
    runtime = cast(TextRuntime, for_speed(request, dtype=dtype))
    reader = Reader(runtime.folder, runtime.context)
    texts = sorted(settings.sentences(), key=len)
    rows = [_row(runtime, reader, texts, size, settings, report) for size in settings.batch]
    memory = measured.Memory(
        peak_rss_bytes=peak_rss_bytes(), peak_vram_bytes=runtime.peak_vram_bytes(), dtype=runtime.dtype
    )
    told = facts(runtime)
    runtime.close()
    return SentencesResult(sentences=rows, memory=memory).having(**told)


def _row(
    runtime: TextRuntime, reader: Reader, texts: list[str], size: int, settings: Sentences, report: Report
) -> measured.SentenceSpeed:
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    _run(runtime, reader, batches[-1], settings.most)
    times = []
    for repeat in range(settings.repeats):
        for number, batch in enumerate(batches):
            start = time.perf_counter()
            _run(runtime, reader, batch, settings.most)
            times.append(time.perf_counter() - start)
            report(repeat * len(batches) + number + 1, settings.repeats * len(batches), f"batches of {size}")
    p50, p95, p99 = (1000 * float(each) for each in np.percentile(times, (50, 95, 99)))
    return measured.SentenceSpeed(
        batch=size,
        n=len(texts),
        latency_ms=measured.Percentiles(p50=p50, p95=p95, p99=p99),
        sentences_s=settings.repeats * len(texts) / sum(times),
        repeats=settings.repeats,
        dtype=runtime.dtype,
    )


def _run(runtime: TextRuntime, reader: Reader, batch: list[str], most: int) -> None:
    """Does what a server does with a batch: reads the texts, computes, and writes the answers."""
    read = reader.read(batch)
    if "translates" in runtime.capabilities:
        reader.write(runtime.translate(read, most))
    else:
        runtime.states(read)
