"""What the installed builder of onnxruntime-genai knows, read from its source."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WRONG = {
    "OlmoForCausalLM": "OLMo's norms subtract the mean, and those of its graph do not",
    "SmolLM3ForCausalLM": "it stops at the layers that do not rotate positions",
}
"""Architectures that the builder has a branch for, and why its graph of them is not the model. Seen with 0.18.0."""


@cache
def architectures() -> frozenset[str]:
    """Returns the architectures that the builder has a branch for; none if it is missing or decides in another way.

    It has no list of them: it compares `config.architectures[0]` with one name after the other. Its source is read, and
    not imported, because it imports torch and transformers.
    """
    found = find_spec("onnxruntime_genai")
    for folder in (found.submodule_search_locations or ()) if found else ():
        source = Path(folder) / "models" / "builder.py"
        if source.is_file():
            return frozenset(_compared(ast.parse(source.read_text(encoding="utf-8"))))
    return frozenset()


def _compared(tree: ast.AST) -> set[str]:
    """Returns the texts that `architectures` of a config is compared with."""
    return {
        each.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and "architectures" in ast.unparse(node.left)
        for side in node.comparators
        for each in ast.walk(side)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }


def knows(architecture: str) -> bool:
    """Returns whether the builder may know an architecture: whether it has a branch, or cannot be asked."""
    known = architectures()
    return not known or architecture in known


_EPSILONS = ("layer_norm_eps", "norm_eps", "layer_norm_epsilon")


def expected(config: Any) -> None:
    """Gives a config of transformers the settings that the builder reads, where it does not know their newest form.

    The builder takes layers for full attention if no `layer_types` say otherwise, also those of a model whose layers
    all have a window. It knows the two frequencies of Gemma 3 by their older names, and what is added to the variance
    in norms by one name only.
    """
    epsilon = next((value for name in _EPSILONS if (value := getattr(config, name, None)) is not None), None)
    if epsilon is not None and getattr(config, "rms_norm_eps", None) is None:
        config.rms_norm_eps = epsilon
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None)
    if config.architectures == ["Gemma3ForCausalLM"] and isinstance(rope, dict) and "full_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(rope["full_attention"])
