"""The config.json that a GGUF file's metadata describe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model.gguf.family import Config, Family

if TYPE_CHECKING:
    import torch

    from lighten.model.gguf_header import Header

    Read = Callable[[str], torch.Tensor]

ROPE_FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, LONG, SHORT)
"""Tensors that say how positions rotate. They are settings, not weights."""
UNROTATED = 1e30
"""Divisor of a frequency that is not used."""
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_of(header: Header, family: Family, facts: ModelFacts, read: Read) -> Config:
    """Returns the config.json of a file.

    Args:
        header: of the file.
        family: its row.
        facts: its sizes.
        read: returns a tensor by its name, float32.

    Raises:
        RequestError: the file has settings that the directory cannot express.
    """
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (value := header.fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[f"{name}_token_id"] = value
    config: Config = {
        "architectures": [facts.architecture],
        "model_type": family.model_type,
        "dtype": "bfloat16",
        "hidden_act": family.activation,
        "hidden_size": facts.hidden,
        "intermediate_size": facts.intermediate,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab,
        "max_position_embeddings": header.integer("context_length"),
        "rms_norm_eps": header.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": facts.tied,
        **ids,
    }
    for key, name in (family.pairs or {}).items():
        value = header.fields.get(f"{header.arch}.{key}")
        if value is not None:
            config[name] = header.decimal(key) if isinstance(value, float) else value
    own = family.config(header)
    rope = {**_rope(header, family, facts, read), **own.pop("rope_base", {})}
    kinds = own.pop("rope_parameters", None)
    config["rope_parameters"] = {"full_attention": rope, **kinds} if kinds else rope
    if "original_max_position_embeddings" in rope and rope["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    config["rope_parameters"] = _without_none(config["rope_parameters"])
    config |= own
    return {name: value for name, value in config.items() if value is not None}


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    found = {name: _without_none(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _rope(header: Header, family: Family, facts: ModelFacts, read: Read) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": header.decimal("rope.freq_base", 10000.0)}
    if family.partial and (rotated := header.integer("rope.dimension_count", facts.head_dim)) != facts.head_dim:
        rope["partial_rotary_factor"] = rotated / facts.head_dim
    kind = header.fields.get(f"{header.arch}.rope.scaling.type", "none")
    factor = header.decimal("rope.scaling.factor", 0.0)
    original = header.integer("rope.scaling.original_context_length", header.integer("context_length"))
    if ROPE_FREQS in header.tensors:
        return {**rope, **_divided(header, facts, rope["rope_theta"], read)}
    if LONG in header.tensors:
        return {
            **rope,
            "rope_type": "longrope",
            **{f"{name}_factor": read(tensor).tolist() for name, tensor in (("long", LONG), ("short", SHORT))},
            "original_max_position_embeddings": original,
            "attention_factor": header.decimal("rope.scaling.attn_factor", 1.0),
        }
    if kind == "none" or not factor:
        return {**rope, "rope_type": "default"}
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        yarn: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if attention := header.decimal("rope.scaling.attn_factor", 0.0):
            yarn["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        for name, key in (family.yarn or {}).items():
            if key and f"{header.arch}.{key}" in header.fields:
                yarn[name] = header.decimal(key)
        if "mscale_all_dim" in yarn:
            yarn.setdefault("mscale", 1.0)
        return {**rope, **yarn}
    raise RequestError(f"{header.path} scales its positions by {kind!r}; lighten reads none, linear, yarn and llama3")


def _divided(header: Header, facts: ModelFacts, theta: float, read: Read) -> dict[str, Any]:
    """Finds the settings of scaled positions whose frequency divisors are the ones the file holds."""
    import torch

    divisors = read(ROPE_FREQS)
    if float(divisors.max()) >= UNROTATED / 10:
        rotated = int((divisors < UNROTATED / 10).sum())
        return {"rope_type": "proportional", "partial_rotary_factor": rotated / len(divisors)}
    factor = float(str(divisors.max().numpy()))
    originals = (_LLAMA3_ROPE["original_max_position_embeddings"], *(1 << power for power in range(4, 18)))
    for original in originals:
        settings = {**_LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": int(original)}
        if torch.allclose(divisors, llama3_divisors(theta, 2 * len(divisors), settings), rtol=1e-3):
            return {"rope_type": "llama3", **settings}
    raise RequestError(f"{header.path}: {ROPE_FREQS} is not the llama3 scaling, the only such table lighten reads")


def llama3_divisors(theta: float, head_dim: int, settings: dict[str, Any]) -> torch.Tensor:
    """Returns what each rotation frequency is divided by under "llama3" scaling, float32 `[head_dim / 2]`.

    Follows `_compute_llama3_parameters` of transformers, which follows Meta's reference code.
    """
    import torch

    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(settings["original_max_position_embeddings"]) / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
