"""Prefill and decoding speed, latency, peak memory and energy of a loaded model."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from lighten.evaluate.energy import Counters
from lighten.evaluate.runtimes import Ids, Runtime
from lighten.evaluate.settings import Speed
from lighten.process import peak_rss_bytes
from lighten.stage import Report

WARM_UP_STEPS = 8
STEADY = 0.25
"""Largest spread of decode speeds that is no cause for a warning."""


def measure(runtime: Runtime, settings: Speed, report: Report) -> dict[str, Any]:
    """Returns `speed` (a row per batch size), `memory` (of this whole process), `energy` and `warnings`."""
    speed: list[dict[str, Any]] = []
    total = len(settings.batch) * (settings.repeats + 1)
    report(0, total, "warming up")
    for batch in settings.batch:
        prompt = _prompt(runtime.vocab, batch, settings.prompt)
        runtime.generate(prompt, min(WARM_UP_STEPS, settings.generate))
        runs = []
        for repeat in range(1, settings.repeats + 1):
            runs.append(runtime.generate(prompt, settings.generate))
            rate = batch * len(runs[-1].token_s) / sum(runs[-1].token_s)
            report(len(speed) * (settings.repeats + 1) + repeat + 1, total, f"{rate:.0f} tok/s")
        decode = [batch * len(run.token_s) / sum(run.token_s) for run in runs]
        speed.append(
            {
                "batch": batch,
                "prompt": settings.prompt,
                "generate": settings.generate,
                "prefill_tok_s": median(batch * settings.prompt / run.ttft_s for run in runs),
                "decode_tok_s": median(decode),
                "ttft_ms": percentiles([run.ttft_s for run in runs]),
                "token_ms": percentiles([seconds for run in runs for seconds in run.token_s]),
                "repeats": settings.repeats,
                "spread": (max(decode) - min(decode)) / median(decode),
                "dtype": runtime.dtype,
            }
        )
    memory = {"peak_rss_bytes": peak_rss_bytes(), "peak_vram_bytes": runtime.peak_vram_bytes(), "dtype": runtime.dtype}
    warnings = [
        f"decode speeds at batch size {row['batch']} differ by {row['spread']:.0%}: the machine was busy, measure again"
        for row in speed
        if row["spread"] > STEADY
    ]
    return {
        "speed": speed,
        "memory": memory,
        "energy": energy(runtime, settings, Counters()),
        "warnings": warnings,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns p50, p95 and p99 in milliseconds."""
    values = 1000 * np.percentile(seconds, [50, 95, 99])
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def energy(runtime: Runtime, settings: Speed, counters: Counters) -> dict[str, Any]:
    """Returns joules per generated token of one more run, or None and the reason."""
    if not counters:
        return {"joules_per_token": None, "note": counters.note}
    batch = settings.batch[0]
    before = counters.read()
    runtime.generate(_prompt(runtime.vocab, batch, 1), settings.generate)
    joules = counters.joules(before, counters.read())
    return {"joules_per_token": joules / (batch * settings.generate), "note": counters.note}


def _prompt(vocab: int, batch: int, length: int) -> Ids:
    """Returns the same random ids every time: what is decoded after them does not change the time it takes."""
    return np.random.default_rng(0).integers(0, vocab, (batch, length))
