"""What the installed converter of CTranslate2 knows, read from its source."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "ctranslate2"
_SOURCE = Path("converters") / "transformers.py"


@cache
def architectures() -> frozenset[str]:
    """Returns the names of transformers' classes that a registered loader converts; none if it is not installed.

    A loader says its class in the property `architecture_name`, or inherits that of another loader.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return frozenset()
    source = Path(found.submodule_search_locations[0]) / _SOURCE
    if not source.is_file():
        return frozenset()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    registered = [node for node in classes.values() if any(map(_registers, node.decorator_list))]
    return frozenset(name for node in registered if (name := _architecture(node, classes)))


def knows(architecture: str) -> bool:
    """Returns whether it converts a model; true if it is not installed, for that is told elsewhere."""
    return not architectures() or architecture in architectures()


def _registers(decorator: ast.expr) -> bool:
    return (
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Name)
        and decorator.func.id == "register_loader"
    )


def _architecture(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> str | None:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "architecture_name":
            told = [each.value for each in ast.walk(part) if isinstance(each, ast.Return)]
            return next((str(each.value) for each in told if isinstance(each, ast.Constant) and each.value), None)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    return next((name for base in bases if (name := _architecture(classes[base], classes))), None)
