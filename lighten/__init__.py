"""Turn a causal language model into the artifact that fits where it must run, and prove what it cost.

The commands are functions too: `lighten.run("quickstart")`, `lighten.quantize(model, out, method="gptq", bits=4)`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "run": "pipeline.run",
    "plan": "pipeline.run",
    "prune": "pipeline.verbs",
    "distill": "pipeline.verbs",
    "quantize": "pipeline.verbs",
    "polish": "pipeline.verbs",
    "export_model": "pipeline.verbs",
    "measure": "pipeline.verbs",
}
__all__ = ["distill", "export_model", "measure", "plan", "polish", "prune", "quantize", "run"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline's functions on first use, so that `import lighten` costs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"lighten.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lighten' has no attribute {name!r}")
