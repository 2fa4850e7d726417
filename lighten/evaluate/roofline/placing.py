"""How near a measured speed is to what the machine's memory and arithmetic allow (Williams et al. 2009, Roofline)."""

from __future__ import annotations

from typing import Any

from lighten.evaluate.roofline.peaks import Peaks
from lighten.evaluate.runtimes.choose import opener
from lighten.model.traffic import Traffic

FASTER = 1.25
"""Factor by which reading a working set is faster than reading memory, from which it counts as cached."""


def point(traffic: Traffic, row: dict[str, Any], peaks: Peaks, dtype: str, runtime: str) -> dict[str, Any] | None:
    """Returns the place of decoding under the roof, and that of prefill, of one row of speeds; None without a speed."""
    batch, prompt = row["batch"], row["prompt"]
    around = prompt + row["generate"] / 2
    head = 2 * traffic.head
    decode = _place(
        2 * traffic.products + head + traffic.attention * around,
        traffic.weights / batch + traffic.cache_bytes * around,
        traffic.weights + batch * traffic.cache_bytes * around,
        row.get("decode_tok_s"),
        peaks,
        dtype,
    )
    known = opener(runtime)
    together = min(batch * prompt, known.together or batch * prompt)
    heads = head if known.every_head else head / prompt
    prefill = _place(
        2 * traffic.products + heads + traffic.attention * (prompt + 1) / 2,
        traffic.weights / together + 2 * traffic.cache_bytes,
        traffic.weights,
        row.get("prefill_tok_s"),
        peaks,
        row.get("prefill_dtype") or dtype,
    )
    if decode is None:
        return None
    shape = {"batch": batch, "context": round(around), "dtype": dtype}
    return {**decode, **shape, "prefill": prefill}


def _place(
    flops: float, read: float, together: float, speed: float | None, peaks: Peaks, dtype: str
) -> dict[str, Any] | None:
    """Returns one point: operations and bytes of a token, what was reached, the roof above it and what makes it.

    `together` are the bytes that are read over and over: they decide whether a cache serves them.
    """
    if not speed or not read:
        return None
    bandwidth, peak = peaks.reading(together), peaks.matrix.get(dtype)
    peak = peak or max((rate for rate in peaks.matrix.values() if rate), default=None)
    intensity = flops / read
    roof = intensity * bandwidth if peak is None else min(intensity * bandwidth, peak)
    reached = flops * speed / 1e9
    computing = peak is not None and peak < intensity * bandwidth
    cached = bandwidth > FASTER * peaks.memory
    bound = "compute" if computing else "cache" if cached else "memory"
    share = reached / roof
    return {
        "flops_per_token": flops,
        "bytes_per_token": read,
        "intensity": intensity,
        "gflop_s": reached,
        "gb_s": read * speed / 1e9,
        "bandwidth_gb_s": bandwidth,
        "roof_gflop_s": roof,
        "share": share,
        "bound": bound,
        "note": _note(bound, share, together, bandwidth, peaks),
    }


def _note(bound: str, share: float, together: float, bandwidth: float, peaks: Peaks) -> str | None:
    """Returns a remark that a share needs."""
    if share > 1:
        served = "a cache held part of what it read" if bound != "compute" else "it computes in a faster type of number"
        doubt = "; the machine was busy when its roofs were measured" if peaks.busy else ""
        return f"above the roof: {served}, or the roof was measured too low{doubt}"
    if bound == "cache":
        return f"its {together / 1e6:,.0f} MB lie partly in a cache, which reads {bandwidth:.0f} GB/s"
    return None


def arithmetic(runtime: str, dtype: str, device: str = "cpu") -> str:
    """Returns the type of number that a runtime multiplies in, by the runtime's name of its weights."""
    return opener(runtime).multiplies_in(dtype, device)
