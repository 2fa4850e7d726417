"""The functions of the package."""

from __future__ import annotations

import importlib
import types

import lighten


def test_a_module_does_not_take_the_place_of_a_function_of_its_name() -> None:
    for module in ("lighten.pipeline.plan", "lighten.pipeline.run", "lighten.pipeline.verbs"):
        importlib.import_module(module)
    for name in lighten.__all__:
        assert isinstance(getattr(lighten, name), types.FunctionType), name
    assert isinstance(importlib.import_module("lighten.pipeline.plan"), types.ModuleType)
