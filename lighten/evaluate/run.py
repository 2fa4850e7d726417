"""One measurement, from its request to the files it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lighten.evaluate.measurement import Measurement
from lighten.evaluate.paired import RESULT
from lighten.evaluate.request import Request
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.runtimes.unavailable import Unavailable
from lighten.evaluate.stored_result import Result
from lighten.plugins import found_at
from lighten.process.isolate import Outcome, share_cores
from lighten.step import Report
from lighten.store.store import write_json


def measure(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measures a model and writes `result.json` and the measurement's other files; the target of `run_isolated`.

    Args:
        payload: that of a `Request`.
        report: called as the work goes on.

    Returns:
        The contents of `result.json`.
    """
    request = Request.from_payload(payload)
    report(0, 1, "loading")
    if not request.settings.timed:
        share_cores()
    try:
        done = _work(request)(request, report)
        found = done.contents() if isinstance(done, Result) else done
    except Unavailable as lack:
        found = {"unavailable": str(lack), **lack.facts}
    if request.server:
        found = {**found, **_served(request, found)}
    result = {"measurement": request.settings.name, **found}
    write_json(request.out / RESULT, result)
    return result


def _served(request: Request[Measurement], found: dict[str, Any]) -> dict[str, Any]:
    """Returns what the result says of the server that lighten started: what it is, and nothing of its place here."""
    address, changed = Address.parse(str(request.model)), {}
    if detail := found.get("detail"):
        changed["detail"] = detail.replace(f"{address.url}, ", "").replace(f"model {address.model}, ", "")
    if "device" in found:
        changed["device"] = request.device
    return {"server": request.server, **changed}


def measure_here(request: Request[Measurement], report: Report) -> Outcome:
    """Runs a measurement that starts its own processes. It does not write the result."""
    outcome: Outcome = _work(request)(request, report)
    return outcome


def _work(request: Request[Measurement]) -> Callable[[Request[Measurement], Report], Any]:
    found: Callable[[Request[Measurement], Report], Any] = found_at(request.settings.work)
    return found
