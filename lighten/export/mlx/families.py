"""The families that the installed mlx_lm has a model class for, found without importing it."""

from __future__ import annotations

import ast
import contextlib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lighten.errors import RequestError

_TABLES = ("MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING")
"""Dictionaries in which mlx_lm's loader looks a family up."""
_MODEL = re.compile(r"^(class Model\(|from .+ import .*\bModel\b)", re.MULTILINE)
"""What the module of a family has: its own class `Model`, or that of another family."""


def check(config: dict[str, Any]) -> None:
    """Checks that mlx_lm has a class for the model of a config.json. If mlx_lm is not here, nothing is known.

    Raises:
        RequestError: it has none.
    """
    folder = _package()
    if folder is None:
        return
    kind = str(config.get("model_type"))
    named = _renamed(folder)
    found = [named[each] for each in ((kind, name) for name in config.get("architectures") or ()) if each in named]
    module = (found or [named.get(kind, kind)])[0]
    if not module.isidentifier() or not _has_model(folder / "models" / f"{module}.py"):
        known = sorted(file.stem for file in (folder / "models").glob("*.py") if _has_model(file))
        raise RequestError(
            f"mlx_lm has no class for the model type {kind}, so nothing would open it: a newer mlx-lm may have one; "
            f"this one knows {', '.join(known)}"
        )


def _package() -> Path | None:
    found = find_spec("mlx_lm")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


@cache
def _renamed(folder: Path) -> dict[Any, str]:
    """Returns the families that another family's class serves: by model type, or by that and the architecture."""
    found: dict[Any, str] = {}
    for node in ast.parse((folder / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in _TABLES:
            with contextlib.suppress(ValueError):  # no plain dictionary: a later version decides in another way
                found |= ast.literal_eval(node.value)
    return found


def _has_model(file: Path) -> bool:
    return file.is_file() and _MODEL.search(file.read_text(encoding="utf-8")) is not None
