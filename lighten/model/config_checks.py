"""Checks of a config.json: its values have the right types, and its sizes are possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError

_TYPES: dict[str, type | tuple[type, ...]] = {
    "architectures": list,
    "model_type": str,
    "quantization_config": dict,
    "text_config": dict,
    "auto_map": dict,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "tie_word_embeddings": bool,
    "dtype": (str, dict),
    "torch_dtype": (str, dict),
}
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_MOST = {"num_hidden_layers": 10_000, "num_attention_heads": 1 << 20}
"""Maximum of each of these sizes. Other sizes must be below 2³¹."""


def check_config(config: dict[str, Any], file: Path) -> None:
    """Checks the types of the values in a config.json, and that it asks for no code of the hub.

    Raises:
        Failure: a value has a type that it cannot have.
        RequestError: it names a kernel that would be fetched and run.
    """
    for key, types in _TYPES.items():
        if (value := config.get(key)) is not None and not isinstance(value, types):
            raise Failure(f"{file}: {key} is {str(value)[:60]!r}, which it cannot be: damaged; fetch it again")
    if not all(isinstance(each, str) for each in config.get("architectures") or []):
        raise Failure(f"{file}: architectures are no names of classes: damaged; fetch it again")
    for part in (config, config.get("text_config") or {}):
        for key in _KERNELS:
            if "/" in str(part.get(key)):
                raise RequestError(
                    f"{file} asks for the kernel {str(part[key])[:60]} of the hub ({key}), which is code that would be "
                    "fetched and run: take that line out, and a kernel of this machine is used"
                )


def refuse_code(config: dict[str, Any], file: Path) -> None:
    """Checks that transformers can build a model without the code that lies beside it.

    Raises:
        RequestError: it cannot; the message says how to allow that code.
    """
    if not (named := config.get("auto_map")):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        code = sorted({str(each).rpartition(".")[0] for each in named.values() if isinstance(each, str)})
        raise RequestError(
            f"{file}: transformers has no model_type {str(config.get('model_type'))[:60]!r}. It is made by code beside "
            f"the weights ({', '.join(code)[:100]}.py), which does not run unless you say so: "
            "trust_remote_code: true in a recipe, and --trust-remote-code on the command line"
        )


def size(config: dict[str, Any], key: str, where: str) -> int:
    """Returns a size.

    Raises:
        KeyError: it is missing.
        RequestError: it is no size.
    """
    value = config[key]
    most = _MOST.get(key, (1 << 31) - 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise RequestError(
            f"{where}: config.json says {key} is {str(value)[:60]}, where a number from 1 to {most:,} belongs"
        )
    return value
