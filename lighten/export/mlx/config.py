"""The config.json of an MLX directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lighten.model.checkpoint import Checkpoint
from lighten.model.loading import readable

FULL, SLIDING = "full_attention", "sliding_attention"


def completed(checkpoint: Checkpoint, trusted: bool) -> dict[str, Any]:
    """Returns a model's config without its quantization, and with every setting in it.

    transformers leaves out what is a default of its own class. MLX's classes have defaults of their own, and know
    rotations and some sizes by their older names only.
    """
    from transformers import AutoConfig

    with readable(checkpoint.path) as folder:
        known = AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    whole = known.to_dict()
    aliases = {name: whole[real] for name, real in known.attribute_map.items() if real in whole}
    config = _filled(checkpoint.config, {"head_dim": checkpoint.facts.head_dim, **aliases, **whole})
    for each in (config, *(value for value in config.values() if isinstance(value, dict))):
        _name_rotation(each)
    return {**config, "tie_word_embeddings": checkpoint.facts.tied}


def _filled(config: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with the settings that it lacks."""
    missing = {
        name: value
        for name, value in whole.items()
        if value is not None and name not in config and not name.startswith("_") and name != "transformers_version"
    }
    inner = {
        name: _filled(value, whole[name])
        for name, value in config.items()
        if name.endswith("_config") and isinstance(value, dict) and isinstance(whole.get(name), dict)
    }
    found = {**missing, **config, **inner}
    found.pop("quantization_config", None)
    return found


def _name_rotation(config: dict[str, Any]) -> None:
    """Adds the older names of a rotation to a config with `rope_parameters`."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get(FULL), dict):
        if "rope_theta" in (local := rope.get(SLIDING) or {}):
            config.setdefault("rope_local_base_freq", local["rope_theta"])
        rope = rope[FULL]
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is not None:
            config.setdefault(name, rope[name])
    rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    config.setdefault("rope_scaling", rest if rest.get("rope_type", "default") != "default" else None)


def quantization(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the settings of config.json for quantized modules: the usual ones, and by name those that differ.

    Args:
        found: `group_size`, `bits` and `mode` of each module.
    """
    usual = Counter(tuple(each.items()) for each in found.values()).most_common(1)[0][0]
    return {**dict(usual), **{name: each for name, each in found.items() if tuple(each.items()) != usual}}


def counted(found: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Returns the number of modules with each width, in words."""
    words = (f"{each['bits']} bits ({each['mode']}, groups of {each['group_size']})" for each in found.values())
    return dict(Counter(words))


def with_quantization(config: dict[str, Any], found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a config that says how modules are quantized, under both names that tools look for."""
    if not found:
        return config
    settings = quantization(found)
    return {**config, "quantization": settings, "quantization_config": settings}


def write_others(checkpoint: Checkpoint, out: Path, config: dict[str, Any]) -> None:
    """Writes config.json, and copies tokenizer, templates and licence; not the settings of GPTQ's and AWQ's tools."""
    checkpoint.write_others(out, config)
    for name in ("quantize_config.json", "quant_config.json"):
        (out / name).unlink(missing_ok=True)
