"""Turn a causal language model into the artifact that fits where it must run, and prove what it cost.

The commands are functions too: `lighten.run("quickstart")`, `lighten.quantize(model, out, method="gptq", bits=4)`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "run": "pipeline",
    "plan": "pipeline",
    "prune": "verbs",
    "distill": "verbs",
    "quantize": "verbs",
    "export_model": "verbs",
    "measure": "verbs",
}
__all__ = ["distill", "export_model", "measure", "plan", "prune", "quantize", "run"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline's functions on first use, so that `import lighten` costs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"lighten.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lighten' has no attribute {name!r}")


class _Package(ModuleType):
    """This package; a module that has the name of one of the functions, as `plan` has, does not take its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
