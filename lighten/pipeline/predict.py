"""The predicted cost of a stage, from what similar stages cost before."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from lighten.evaluate import machine
from lighten.evaluate.machine import this_machine
from lighten.model.accelerator import CPU, Device
from lighten.pipeline.stage import Stage
from lighten.store.store import Store

GPU_FLOPS = 150e12, 30e12
"""Operations per second of a large GPU in bfloat16 and in float32, before anything was measured here."""


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a stage on this machine."""

    seconds: float
    peak_bytes: int
    disk_bytes: int


def nominal_flops(device: Device = CPU) -> tuple[float, float]:
    """Returns floating-point operations per second of a device: bfloat16 (or its best type), and float32.

    These are rough figures, per core for the processor. A `Predictor` corrects them by the cost of earlier stages.
    """
    if device.name != "cpu":
        return GPU_FLOPS
    found = machine.fingerprint()
    cores = int(found["cores"])
    wide = "avx512f" in found["flags"]
    plain = cores * (70e9 if wide else 35e9)
    fast = cores * 150e9 if {"avx512_bf16", "amx_bf16"} & set(found["flags"]) else plain
    return fast, plain


class Predictor:
    """Turns estimates into predictions for this machine, corrected by the cost of earlier stages here."""

    def __init__(self, store: Store, device: Device = CPU) -> None:
        here = this_machine() | device.key()
        fast, plain = nominal_flops(device)
        self._rates = fast, plain
        ratios: dict[str, list[float]] = {}
        for cost in store.costs():
            if cost.get("machine") == here and cost.get("nominal_seconds"):
                ratios.setdefault(cost["what"], []).append(cost["seconds"] / cost["nominal_seconds"])
        self._ratios = {what: median(values) for what, values in ratios.items()}

    def nominal_seconds(self, stage: Stage) -> float:
        """Returns the time by arithmetic alone."""
        work = stage.estimate.fast_flops / self._rates[0] + stage.estimate.float32_flops / self._rates[1]
        return float(4 + stage.estimate.seconds + work)

    def predict(self, stage: Stage) -> Prediction:
        """Returns time, peak memory and disk of a stage."""
        seconds = self.nominal_seconds(stage) * self._ratios.get(cost_class(stage), 1.0)
        return Prediction(seconds, stage.estimate.peak_bytes, stage.estimate.disk_bytes)


def cost_class(stage: Stage) -> str:
    """Returns the class of stages whose costs predict each other."""
    origin = stage.parents[0].kind if stage.measure else ""
    return f"{stage.measure or stage.name} {origin}".strip()
