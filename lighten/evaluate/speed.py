"""Prefill and decoding speed, latency, peak memory and energy of a loaded model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from lighten import steady
from lighten.evaluate.energy import Counters, GpuCounters, counters
from lighten.evaluate.runtimes import Ids, Runtime, Timings
from lighten.evaluate.settings import Speed
from lighten.process import peak_rss_bytes
from lighten.stage import Report

WARM_UP_STEPS = 8
WARM = 0.05
"""Largest change of speed between two warm-ups after which the machine counts as warm."""
WARM_UPS = 5


def measure(runtime: Runtime, settings: Speed, report: Report) -> dict[str, Any]:
    """Returns `speed` (a row per shape), `memory` (of this whole process), `energy` and `warnings`."""
    speed: list[dict[str, Any]] = []
    shapes = [(prompt, batch) for prompt in settings.prompt for batch in settings.batch]
    for number, (length, batch) in enumerate(shapes):
        runs = _runs(runtime, _prompt(runtime.vocab, batch, length), settings, report, (number, len(shapes)))
        decode = [_rate(run, batch) for run in runs]
        speed.append(
            {
                "batch": batch,
                "prompt": length,
                "generate": settings.generate,
                "prefill_tok_s": median(batch * length / run.ttft_s for run in runs),
                "decode_tok_s": median(decode),
                "ttft_ms": percentiles([run.ttft_s for run in runs]),
                "token_ms": percentiles([seconds for run in runs for seconds in run.token_s]),
                "repeats": len(runs),
                "spread": steady.spread(decode),
                "error": steady.relative_error(decode),
                "drift": steady.drift(decode),
                "dtype": runtime.dtype,
                **runtime.options,
            }
        )
    memory = {"peak_rss_bytes": peak_rss_bytes(), "peak_vram_bytes": runtime.peak_vram_bytes(), "dtype": runtime.dtype}
    return {
        "speed": speed,
        "memory": memory,
        "energy": energy(runtime, settings, counters(runtime.device)),
        "warnings": [text for row in speed for text in _doubts(row)],
    }


def _runs(runtime: Runtime, prompt: Ids, settings: Speed, report: Report, place: tuple[int, int]) -> list[Timings]:
    """Warms up until two runs in a row are as fast, and repeats until the median is known well enough."""
    number, shapes = place
    batch, most = len(prompt), 2 * settings.repeats
    report(number * most, shapes * most, "warming up")
    before = 0.0
    # what is compiled, or made for one length, is warm only for what it will do
    whole = settings.compile != "off" or settings.cache == "static"
    steps = settings.generate if whole else min(WARM_UP_STEPS, settings.generate)
    for _ in range(WARM_UPS):
        rate = _rate(runtime.generate(prompt, steps), batch)
        if abs(rate - before) <= WARM * rate:
            break
        before = rate
    runs: list[Timings] = []
    while len(runs) < most:
        runs.append(runtime.generate(prompt, settings.generate))
        rates = [_rate(run, batch) for run in runs]
        report(number * most + len(runs), shapes * most, f"{rates[-1]:.0f} tok/s")
        if len(runs) >= settings.repeats and steady.relative_error(rates) <= settings.error:
            break
    return runs


def _rate(run: Timings, batch: int) -> float:
    return batch * len(run.token_s) / sum(run.token_s)


def _doubts(row: dict[str, Any]) -> Iterator[str]:
    where = f"decode speeds at batch size {row['batch']}, prompt {row['prompt']}"
    if row["spread"] > steady.UNSTEADY:
        yield f"{where} differ by {row['spread']:.0%}: the machine was busy, measure again"
    if row["drift"]:
        turned = "fell" if row["drift"] < 0 else "rose"
        yield f"{where} {turned} by {abs(row['drift']):.0%} while they were measured: heat or clock frequency drifts"


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns p50, p95 and p99 in milliseconds."""
    values = 1000 * np.percentile(seconds, [50, 95, 99])
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def energy(runtime: Runtime, settings: Speed, source: Counters | GpuCounters) -> dict[str, Any]:
    """Returns joules per generated token of one more run (several if a counter is slow), or None and the reason."""
    if not source:
        return {"joules_per_token": None, "note": source.note}
    batch = settings.batch[0]
    before, begin, runs = source.read(), time.monotonic(), 0
    while runs == 0 or time.monotonic() - begin < source.least:
        runtime.generate(_prompt(runtime.vocab, batch, 1), settings.generate)
        runs += 1
    joules = source.joules(before, source.read())
    return {"joules_per_token": joules / (runs * batch * settings.generate), "note": source.note}


def _prompt(vocab: int, batch: int, length: int) -> Ids:
    """Returns the same random ids every time: what is decoded after them does not change the time it takes."""
    return np.random.default_rng(0).integers(0, vocab, (batch, length))
