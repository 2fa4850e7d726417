"""How positions rotate queries and keys, as the metadata and tensors of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model.gguf.config import LONG, ROPE_FREQS, SHORT, UNROTATED, llama3_divisors
from lighten.model.gguf.family import Family

if TYPE_CHECKING:
    import torch


@dataclass
class Rotation:
    """The metadata and tensors of the rotation."""

    dimensions: int
    """Number of dimensions of each head that are rotated."""
    keys: dict[str, Any]
    """Metadata, by key without the architecture's name."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Divisors of the frequencies, float32 `[dimensions / 2]`, by the tensor's name."""
    warnings: list[str] = field(default_factory=list)


def rotation(config: dict[str, Any], facts: ModelFacts, family: Family) -> Rotation:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (earlier versions).

    Raises:
        RequestError: llama.cpp cannot rotate in this way for this architecture.
    """
    now = config.get("rope_parameters") or {}
    settings = {**(config.get("rope_scaling") or {}), **now.get("full_attention", now)}
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    known = ("default", *family.scalings)
    if kind not in known:
        raise RequestError(
            f"config.json scales positions by {kind!r}; known are {', '.join(known[:-1])} and {known[-1]}"
        )
    part = float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    width = family.rotates(config, facts)
    if kind == "proportional":
        return _proportional(width, part, theta)
    if part != 1.0 and not family.partial:
        raise RequestError(
            "config.json rotates a part of each head (partial_rotary_factor), which llama.cpp lacks here"
        )
    found = Rotation(int(width * part), {"rope.freq_base": theta})
    longest = int(config["max_position_embeddings"])
    original = settings.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    settings["original_max_position_embeddings"] = int(original or longest)
    if kind == "llama3":
        found.tensors[ROPE_FREQS] = llama3_divisors(theta, width, settings)
    if kind in ("linear", "yarn"):
        found.keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        found.keys |= _yarn(settings, family.yarn or {})
        if settings.get("truncate") is False:
            found.warnings.append(
                "llama.cpp rounds the borders of YaRN's ramp, which this model does not (truncate: false)"
            )
    if kind == "longrope":
        _add_longrope(found, settings, longest)
    return found


def _proportional(width: int, part: float, theta: float) -> Rotation:
    """Rotates the first pairs of a head of all its width. The other pairs turn by nothing: their divisors are huge."""
    import torch

    rotated = int(width * part) // 2
    divisors = torch.tensor([1.0] * rotated + [UNROTATED] * (width // 2 - rotated), dtype=torch.float32)
    return Rotation(width, {"rope.freq_base": theta}, {ROPE_FREQS: divisors})


def _yarn(settings: dict[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Returns the keys of YaRN. llama.cpp itself multiplies the attention factor by the paper's 0.1 ln(s) + 1."""
    unread = {"beta_fast": (None, 32), "beta_slow": (None, 1), "mscale": (None, 0), "mscale_all_dim": (None, 0)}
    odd = [key for key, usual in {**unread, "truncate": (None, True)}.items() if settings.get(key) not in usual]
    if strange := [key for key in odd if key not in known]:
        raise RequestError(
            f"config.json sets {strange[0]} for YaRN, which llama.cpp does not read for this architecture"
        )
    keys: dict[str, Any] = {"rope.scaling.original_context_length": settings["original_max_position_embeddings"]}
    keys |= {name: float(settings[key]) for key, name in known.items() if name and settings.get(key) is not None}
    if attention := settings.get("attention_factor"):
        keys["rope.scaling.attn_factor"] = float(attention) / (0.1 * math.log(float(settings["factor"])) + 1.0)
    return keys


def _add_longrope(found: Rotation, settings: dict[str, Any], longest: int) -> None:
    """Adds the two tables of LongRoPE, and its attention factor as transformers computes it."""
    import torch

    original = settings["original_max_position_embeddings"]
    for name, tensor in (("long", LONG), ("short", SHORT)):
        divisors = settings.get(f"{name}_factor") or []
        if len(divisors) != found.dimensions // 2:
            raise RequestError(
                f"config.json has {len(divisors)} numbers as {name}_factor, and {found.dimensions // 2} are needed"
            )
        found.tensors[tensor] = torch.tensor(divisors, dtype=torch.float32)
    found.warnings.append(
        f"llama.cpp takes the long rotation whenever it is opened with room for more than {original} tokens, "
        "transformers only for a text that is longer"
    )
    stretch = float(settings.get("factor") or longest / original)
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    found.keys["rope.scaling.original_context_length"] = original
    found.keys["rope.scaling.attn_factor"] = float(settings.get("attention_factor") or usual)
