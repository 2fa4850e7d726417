"""How fast a machine reads memory and multiplies matrices: measured once, and kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lighten.evaluate import machine
from lighten.model import accelerator
from lighten.step import Report
from lighten.store.store import write_json

VERSION = 1
"""Version of the way of measuring. Figures of another version are measured again."""
REPEATS = 7
BUSY = 0.2
"""Spread of repeats above which other work is assumed to have run meanwhile."""
SIZES = [2**power for power in range(22, 30)]
"""Bytes that are read over and over. Data in a cache is read faster."""
MATRIX = {"cpu": 2048, "cuda": 8192}
LONGEST = 1.2
"""Maximum number of seconds for one type of number. It is tried on smaller matrices first."""


@dataclass(frozen=True)
class Peaks:
    """The peaks of a device: GB/s of reading by number of bytes, and GFLOP/s of products by type of number."""

    device: str
    bandwidth: list[tuple[int, float]]
    matrix: dict[str, float | None]
    spread: float
    """Excess of the median repeat over the shortest, the median of all measurements."""
    measured: str
    """Date of the measurement."""

    @property
    def memory(self) -> float:
        """GB/s from memory, which is the rate of the largest buffer."""
        return self.bandwidth[-1][1]

    @property
    def busy(self) -> bool:
        """Whether the repeats differ so much that the machine did other work."""
        return self.spread > BUSY

    def reading(self, size: float) -> float:
        """Returns the GB/s at which `size` bytes are read over and over, interpolated by logarithm."""
        before = self.bandwidth[0]
        for after in self.bandwidth:
            if size <= after[0]:
                if after is before or size <= before[0]:
                    return after[1]
                share = math.log(size / before[0]) / math.log(after[0] / before[0])
                return before[1] + share * (after[1] - before[1])
            before = after
        return self.memory

    def facts(self) -> dict[str, Any]:
        """Returns the part for results.json."""
        curve = {str(size): round(rate, 2) for size, rate in self.bandwidth}
        return {
            "bandwidth_gb_s": round(self.memory, 2),
            "matrix_gflop_s": {name: rate and round(rate, 1) for name, rate in self.matrix.items()},
            "bandwidth_by_size": curve,
            "peaks": {"device": self.device, "measured": self.measured, "spread": round(self.spread, 3)},
        }


def folder() -> Path:
    """Returns the directory of a person's caches."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "lighten"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lighten"


def cache_file(device: str) -> Path:
    """Returns the file for this machine and device, named by what the figures depend on."""
    found = machine.fingerprint()
    names = ("cpu", "cores", "memory_bytes", "os", "flags", "gpus")
    what = {name: found[name] for name in names} | {"device": device, "version": VERSION}
    what["torch"] = found["packages"].get("torch")
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return folder() / "peaks" / f"{key}.json"


def load(device: str) -> Peaks | None:
    """Returns earlier figures of this machine, or None. A damaged file counts as none."""
    try:
        value = json.loads(cache_file(device).read_text(encoding="utf-8"))
        value["bandwidth"] = [(int(size), float(rate)) for size, rate in value["bandwidth"]]
        return Peaks(**value)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save(peaks: Peaks) -> None:
    """Keeps the figures. If the directory cannot be written to, they are measured again next time."""
    file = cache_file(peaks.device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(peaks))
    except OSError:
        return


def measure(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measures the device in `payload`, in some three seconds. Returns the fields of `Peaks`."""
    import torch

    device = payload["device"]
    kind = accelerator.device_type(device)
    if kind == "cpu":
        torch.set_num_threads(machine.cores())
    room = machine.fingerprint()["memory_bytes"] // 8 if kind == "cpu" else torch.cuda.mem_get_info(device)[0] // 4
    scale = 1 if kind == "cpu" else 8  # a GPU's caches are larger, and it needs more to do
    sizes = [size * scale for size in SIZES if size * scale <= room]
    names = ["float32", "bfloat16", "int8"] if kind == "cpu" else ["float32", "bfloat16", "float16", "int8"]
    total, spreads = len(sizes) + len(names), []
    bandwidth = []
    for done, size in enumerate(sizes):
        report(done, total, f"reading {size / 1e6:,.0f} MB")
        best, spread = _read(size, device)
        bandwidth.append((size, size / best / 1e9))
        spreads.append(spread)
    matrix: dict[str, float | None] = {}
    for done, name in enumerate(names, len(sizes)):
        report(done, total, f"multiplying {name}")
        matrix[name], spread = _multiply(name, MATRIX[kind], device)
        spreads.append(spread)
    report(total, total, "")
    return asdict(Peaks(device, bandwidth, matrix, median(spreads), time.strftime("%Y-%m-%d", time.gmtime())))


def _read(size: int, device: str) -> tuple[float, float]:
    """Returns the least seconds in which `size` bytes are added up, and the spread of the repeats."""
    import torch

    buffer = torch.ones(size // 4, device=device)
    # a GPU is asked for many sums at once; a processor is timed at each sum, so that at least one is not disturbed
    times, most = (1, 200) if device == "cpu" else (max(1, 2**32 // size), REPEATS)
    return _timed(lambda: [torch.sum(buffer) for _ in range(times)], device, times, most, 0.2)


def _multiply(name: str, width: int, device: str) -> tuple[float | None, float]:
    """Returns the most GFLOP/s of square products of a type (None if there are none), and the spread."""
    best: float | None = None
    spread = 0.0
    for size in (width // 8, width // 2, width):
        for product in _products(name, size, device):
            try:
                seconds, scatter = _timed(product, device, 1, REPEATS, LONGEST / 2)
            except (RuntimeError, NotImplementedError):
                continue  # this build of torch has no such product
            rate = 2 * size**3 / seconds / 1e9
            if best is None or rate > best:
                best, spread = rate, scatter
        if best is None or 2 * (2 * size) ** 3 / best / 1e9 * REPEATS > LONGEST:
            break
    return best, spread


def _products(name: str, size: int, device: str) -> list[Callable[[], Any]]:
    """Returns the ways in which torch multiplies square matrices of a type: the fastest one counts."""
    import torch

    if name == "int8":
        whole = torch.randint(-100, 100, (size, size), dtype=torch.int8, device=device)
        return [lambda: torch._int_mm(whole, whole.t())]  # a GPU wants the second one column by column
    left = torch.randn(size, size, device=device).to(getattr(torch, name))
    found: list[Callable[[], Any]] = [lambda: left @ left, lambda: left @ left.T]
    if device == "cpu" and name == "float32" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        packed = torch.ops.mkldnn._reorder_linear_weight(left, size)  # over twice as fast as MKL on AMD
        found.append(lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""))
    return found


def _timed(work: Callable[[], Any], device: str, times: int, most: int, enough: float) -> tuple[float, float]:
    """Returns the least seconds of a `times`-th of the work, and the spread of the repeats.

    There are `most` of them, or fewer if these take `enough` seconds.
    """

    def now() -> float:
        accelerator.synchronize(device)
        return time.perf_counter()

    work()
    seconds: list[float] = []
    begin = now()
    while len(seconds) < most and (len(seconds) < 3 or now() - begin < enough):
        start = now()
        work()
        seconds.append((now() - start) / times)
    return min(seconds), median(seconds) / min(seconds) - 1
