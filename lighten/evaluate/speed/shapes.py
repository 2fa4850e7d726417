"""Prefill and decoding speed, latency, peak memory and energy of a loaded model: a row for each shape of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from lighten.evaluate.runtimes.runtime import Ids, Runtime, Timings
from lighten.evaluate.speed.energy import Counters, GpuCounters, counters
from lighten.evaluate.speed.settings import Speed
from lighten.evaluate.stored_result import SpeedResult
from lighten.numerics import steady
from lighten.process.isolate import peak_rss_bytes
from lighten.results import measured
from lighten.step import Report

WARM_UP_STEPS = 8
WARM = 0.05
"""Largest change of speed between two warm-ups for which the machine counts as warm."""
WARM_UPS = 5
ALMOST = 0.8
"""Share of another arithmetic's speed that a short trial must reach for a full measurement."""


@dataclass(frozen=True)
class Opened:
    """What is kept of a runtime that was measured and closed."""

    name: str
    device: str
    detail: str
    dtype: str


def measure(runtime: Runtime, settings: Speed, report: Report) -> SpeedResult:
    """Returns `speed` (a row per shape), `memory` (of this whole process), `energy` and `warnings`."""
    shapes = _shapes(settings)
    speed = [_row(runtime, settings, report, (number, len(shapes)), *shape) for number, shape in enumerate(shapes)]
    memory, spent = _costs(runtime, settings)
    return SpeedResult(speed=speed, memory=memory, energy=spent, warnings=_all_doubts(speed))


def measure_better(
    open_in: Callable[[str], Runtime], dtypes: tuple[str, str], settings: Speed, report: Report
) -> tuple[SpeedResult, Opened]:
    """Returns the result of `measure`, each phase of each shape in the faster of two arithmetics, and the runtime.

    The first arithmetic is measured. The second one reads a prompt and writes a few tokens; it is measured too if that
    was as fast. Memory and energy are those of the arithmetic that decodes the first shape. The first runtime is closed
    before the second is opened, so no peak is that of both.

    Args:
        open_in: loads the model in an arithmetic.
        dtypes: the two arithmetics; the weights of the first take less memory.
        settings: what to measure.
        report: called as the work goes on.
    """
    found, used = _measured(open_in(dtypes[0]), settings, report)
    other = open_in(dtypes[1])
    rows, shapes = list(found.speed), _shapes(settings)
    for number, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
        length, batch = shape
        prompt = _prompt(other.vocab, batch, length)
        tried = [other.generate(prompt, min(WARM_UP_STEPS, settings.generate)) for _ in range(2)][-1]
        quicker = {
            "prefill": batch * length / tried.ttft_s >= ALMOST * (row.prefill_tok_s or 0),
            "decode": _rate(tried, batch) >= ALMOST * (row.decode_tok_s or 0),
        }
        if any(quicker.values()):
            again = _row(other, settings, report, (number, len(shapes)), *shape)
            rows[number] = _better(row, again)
    found = found.having(speed=rows, warnings=_all_doubts(rows))
    if rows[0].dtype == dtypes[1]:
        memory, spent = _costs(other, settings)
        found = found.having(memory=memory, energy=spent)
        used = Opened(other.name, other.device, other.detail, other.dtype)
    other.close()
    return found, used


def _measured(runtime: Runtime, settings: Speed, report: Report) -> tuple[SpeedResult, Opened]:
    found = measure(runtime, settings, report)
    used = Opened(runtime.name, runtime.device, runtime.detail, runtime.dtype)
    runtime.close()
    return found, used


def _better(first: measured.Speed, second: measured.Speed) -> measured.Speed:
    """Returns a row with the faster prefill and the faster decoding of two rows, and the arithmetic of each."""
    decode = max(first, second, key=lambda row: row.decode_tok_s or 0)
    prefill = max(first, second, key=lambda row: row.prefill_tok_s or 0)
    taken = {"prefill_tok_s": prefill.prefill_tok_s, "ttft_ms": prefill.ttft_ms, "prefill_dtype": prefill.dtype}
    return decode.model_copy(update=taken)


def _shapes(settings: Speed) -> list[tuple[int, int]]:
    return [(prompt, batch) for prompt in settings.prompt for batch in settings.batch]


def _row(
    runtime: Runtime, settings: Speed, report: Report, place: tuple[int, int], length: int, batch: int
) -> measured.Speed:
    runs = _runs(runtime, _prompt(runtime.vocab, batch, length), settings, report, place)
    decode = [_rate(run, batch) for run in runs]
    return measured.Speed(
        batch=batch,
        prompt=length,
        generate=settings.generate,
        prefill_tok_s=median(batch * length / run.ttft_s for run in runs),
        decode_tok_s=median(decode),
        ttft_ms=percentiles([run.ttft_s for run in runs]),
        token_ms=percentiles([seconds for run in runs for seconds in run.token_s]),
        repeats=len(runs),
        spread=steady.spread(decode),
        error=steady.relative_error(decode),
        drift=steady.drift(decode),
        dtype=runtime.dtype,
        **runtime.options,
    )


def _costs(runtime: Runtime, settings: Speed) -> tuple[measured.Memory, measured.Energy]:
    """Returns the memory of this whole process and the energy of a token; nothing of what runs elsewhere."""
    if runtime.elsewhere:
        return measured.Memory(dtype=runtime.dtype), measured.Energy(note="the model runs outside of this process")
    vram = runtime.peak_vram_bytes()
    memory = measured.Memory(peak_rss_bytes=peak_rss_bytes(), peak_vram_bytes=vram, dtype=runtime.dtype)
    return memory, energy(runtime, settings, counters(runtime.device))


def _runs(runtime: Runtime, prompt: Ids, settings: Speed, report: Report, place: tuple[int, int]) -> list[Timings]:
    """Warms up until two runs in a row are equally fast. Repeats until the median is known well enough."""
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


def _all_doubts(rows: list[measured.Speed]) -> list[str]:
    return [text for row in rows for text in _doubts(row)]


def _doubts(row: measured.Speed) -> Iterator[str]:
    where = f"decode speeds at batch size {row.batch}, prompt {row.prompt}"
    if row.spread and row.spread > steady.UNSTEADY:
        yield f"{where} differ by {row.spread:.0%}: the machine was busy, measure again"
    if row.drift:
        turned = "fell" if row.drift < 0 else "rose"
        yield f"{where} {turned} by {abs(row.drift):.0%} while they were measured: heat or clock frequency drifts"


def percentiles(seconds: list[float]) -> measured.Percentiles:
    """Returns p50, p95 and p99 in milliseconds."""
    p50, p95, p99 = (float(each) for each in 1000 * np.percentile(seconds, [50, 95, 99]))
    return measured.Percentiles(p50=p50, p95=p95, p99=p99)


def energy(runtime: Runtime, settings: Speed, source: Counters | GpuCounters) -> measured.Energy:
    """Returns joules per generated token of one more run (several if a counter is slow), or None and the reason."""
    if not source:
        return measured.Energy(joules_per_token=None, note=source.note)
    batch = settings.batch[0]
    before, begin, runs = source.read(), time.monotonic(), 0
    while runs == 0 or time.monotonic() - begin < source.least:
        runtime.generate(_prompt(runtime.vocab, batch, 1), settings.generate)
        runs += 1
    joules = source.joules(before, source.read())
    return measured.Energy(joules_per_token=joules / (runs * batch * settings.generate), note=source.note)


def _prompt(vocab: int, batch: int, length: int) -> Ids:
    """Returns the same random ids every time. What they are does not change the time of decoding."""
    return np.random.default_rng(0).integers(0, vocab, (batch, length))
