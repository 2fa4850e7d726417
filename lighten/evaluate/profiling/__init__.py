"""The time of a prefill and of decoding, operator by operator, and the bottleneck that it points to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import RequestError
from lighten.evaluate.profiling.verdict import Phase, judge
from lighten.evaluate.request_model import as_served
from lighten.evaluate.runtimes.choose import find_opener
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.plugins import found_at
from lighten.process.isolate import share_cores
from lighten.step import Report
from lighten.store.store import write_json

TRACE = "trace.json.gz"
SUMMARY = "profile.json"
SHOWN = 30
PHASES = ("prefill", "decode")
Mark = Callable[[str], AbstractContextManager[Any]]
"""Function of the name of a phase, whose block belongs to that phase."""


def profile(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Profiles a model as it is served; the target of `lighten.process.isolate.run_isolated`.

    Args:
        payload: `model` (a path), `out` (an existing directory), `device`, `prompt` and `steps` (tokens), and
            `trust_remote_code`.
        report: called as the work goes on.

    Returns:
        The contents of `profile.json`, which lies in `out` beside the trace.
    """
    share_cores()
    out, prompt, steps = Path(payload["out"]), int(payload["prompt"]), int(payload["steps"])
    report(0, 3, "loading")
    known, _ = find_opener(Path(payload["model"]))
    if (profiler := known.profiler) is None:
        raise RequestError(f"{payload['model']} runs on {known.name}, which has no profiler that lighten knows")
    runtime = as_served(Path(payload["model"]), payload["device"], trusted=payload["trust_remote_code"])
    prompt = min(prompt, (runtime.context or prompt + steps) - steps - 1)
    ids = [int(each) for each in np.random.default_rng(0).integers(0, runtime.vocab, prompt)]
    report(1, 3, "without the profiler")
    drive(runtime, ids, 2, _no_mark)
    plain = timed(runtime, ids, steps)
    report(2, 3, "with the profiler")
    found: list[Phase] = found_at(profiler)(runtime, ids, steps, out / TRACE)
    result = {
        "runtime": runtime.name,
        "device": runtime.device,
        "dtype": runtime.dtype,
        "detail": runtime.detail,
        "prompt": prompt,
        "steps": steps,
        "plain_seconds": plain,
        "phases": [_as_json(phase) for phase in found],
        "trace": TRACE,
    }
    write_json(out / SUMMARY, result)
    return result


def _as_json(phase: Phase) -> dict[str, Any]:
    found = judge(phase)
    operators = sorted(phase.operators, key=lambda each: -each.seconds)
    return {
        "name": phase.name,
        "seconds": phase.seconds,
        **asdict(found),
        "operators": [{**asdict(each), "share": each.seconds / phase.seconds} for each in operators[:SHOWN]],
    }


def drive(runtime: Runtime, ids: list[int], steps: int, mark: Mark) -> None:
    """Reads a prompt and decodes `steps` tokens after it greedily, each under its mark."""
    decoding = runtime.decode(ids, steps + 1)
    with mark("prefill"):
        logits = next(decoding)
    with mark("decode"):
        for _ in range(steps):
            logits = decoding.send(int(logits.argmax()))
    decoding.close()


def timed(runtime: Runtime, ids: list[int], steps: int) -> dict[str, float]:
    """Returns the seconds of each phase, without a profiler."""
    found: dict[str, float] = {}
    drive(runtime, ids, steps, lambda name: clock(name, found))
    return found


@contextlib.contextmanager
def clock(name: str, into: dict[str, float]) -> Any:
    """Notes the seconds that its block takes."""
    begin = time.perf_counter()
    yield
    into[name] = time.perf_counter() - begin


def _no_mark(_name: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()
