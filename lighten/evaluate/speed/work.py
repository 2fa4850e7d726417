"""Measures speed, in the faster arithmetic."""

from __future__ import annotations

from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_speed
from lighten.evaluate.runtimes.choose import served_in
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speed import shapes
from lighten.evaluate.speed.settings import Speed
from lighten.evaluate.stored_result import SpeedResult
from lighten.step import Report


def measure(request: Request[Speed], report: Report) -> SpeedResult:
    """Returns a row for every shape, memory and energy."""
    settings, model, device = request.settings, request.model, request.device

    def opened(dtype: str | None = None) -> Runtime:
        return for_speed(request, options=settings, dtype=dtype)

    if device != "cpu" or served_in(model, "cpu") != "float32":
        runtime = opened()
        return shapes.measure(runtime, settings, report).having(**facts(runtime))
    # bfloat16 without units for it reads half the bytes and multiplies slowly: which one wins depends on the phase
    found, used = shapes.measure_better(opened, ("bfloat16", "float32"), settings, report)
    return found.having(**facts(used))
