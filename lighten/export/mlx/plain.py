"""Weights that are not rounded here: plain ones, and the codes of a quantized checkpoint as they are.

They keep their names. mlx_lm's class of a family renames, stacks and splits them when it loads a directory, packed ones
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lighten.errors import Failure, RequestError
from lighten.export.mlx import config as mlx_config
from lighten.export.mlx.codes import Kept, kept, kept_floats
from lighten.export.mlx.rounding import packed_table
from lighten.export.mlx.settings import DEFAULT_GROUP, Mlx
from lighten.model.anatomy import EMBEDDING_WEIGHT, HEAD_WEIGHT
from lighten.model.checkpoint import Checkpoint
from lighten.model.mlx_source import MAKER
from lighten.model.quantized.packed import Codes, Parts
from lighten.model.shards import ShardWriter
from lighten.model.unpacked import Unpacked, open_checkpoint
from lighten.step import Context

TABLES = (EMBEDDING_WEIGHT, HEAD_WEIGHT)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STORED = ("F16", "BF16", "F32")


@dataclass
class _Told:
    """What became of the weights, for the person."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of each module with packed weights."""
    kept: int = 0
    unpacked: int = 0
    off: float = 0.0
    """Largest difference of a kept weight, in steps."""
    changed: int = 0
    """Plain weights that another type does not hold."""
    plain: int = 0


def write(step: Mlx, source: Path, out: Path, context: Context) -> dict[str, Any]:
    """Writes a model into the existing directory `out`, and returns facts.

    Raises:
        RequestError: weights that the type does not reach.
        Failure: the parts of a linear do not fit together.
    """
    checkpoint = open_checkpoint(source)
    dtype = getattr(torch, step.dtype) if step.dtype else _own_type(checkpoint)
    told = _Told()
    names = [name for name in checkpoint.shapes() if not (checkpoint.facts.tied and name == HEAD_WEIGHT)]
    if step.embedding_bits and not set(TABLES) & set(names):
        raise RequestError(f"this model has no {EMBEDDING_WEIGHT} and no {HEAD_WEIGHT}: leave out `embedding`")
    with ShardWriter(out, 3 * len(names), library=MAKER) as writer:
        for number, name in enumerate(names, 1):
            for part, tensor in _parts(step, checkpoint, name, dtype, told):
                writer.add(part, tensor)
            context.report(number, len(names), "")
    whole = mlx_config.completed(checkpoint, context.trust_remote_code)
    whole["dtype"] = str(dtype).removeprefix("torch.")
    mlx_config.write_others(checkpoint, out, mlx_config.with_quantization(whole, told.modules))
    return _facts(told, checkpoint, whole["dtype"], context)


def _own_type(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the type of number of a quantized checkpoint's scales; of a plain one the type that holds all weights."""
    if isinstance(checkpoint, Unpacked) and checkpoint.packed:
        parts = checkpoint.tensors(f"{next(iter(checkpoint.packed))}.")
        scales = parts.get("scales", parts.get("weight_scale"))
        if scales is not None and scales.dtype in FLOATS:
            return scales.dtype
    types = checkpoint.types()
    if types & set(_STORED) == {"F16"}:
        return torch.float16
    return torch.float32 if types & {"F16", "F32"} else torch.bfloat16


def _parts(
    step: Mlx, checkpoint: Checkpoint, name: str, dtype: torch.dtype, told: _Told
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what a weight is stored as, by name."""
    module = name.removesuffix(".weight")
    found = None
    if isinstance(checkpoint, Unpacked) and module in checkpoint.packed:
        found = _kept(checkpoint, module, dtype)
        told.kept, told.unpacked = told.kept + (found is not None), told.unpacked + (found is None)
    if found is None:
        tensor = _cast(checkpoint.tensor(name), dtype, name, told)
        if not (step.embedding_bits and name in TABLES):
            yield name, tensor
            return
        found = packed_table(tensor, step.embedding_bits, step.group_size or DEFAULT_GROUP)
    told.modules[module], told.off = found.settings, max(told.off, found.off)
    for part, each in found.tensors.items():
        yield f"{module}.{part}", each


def _kept(checkpoint: Unpacked, module: str, dtype: torch.dtype) -> Kept | None:
    """Returns a quantized linear in MLX's form; None for codes of another kind."""
    parts = checkpoint.tensors(f"{module}.")
    if (floats := kept_floats(parts)) is not None:
        return floats
    found = _codes(checkpoint, module, parts)
    return None if found is None else kept(found, dtype, module)


def _codes(checkpoint: Unpacked, module: str, parts: Parts) -> Codes | None:
    packed = parts.get("qweight", parts.get("weight_packed"))
    if packed is None or packed.dtype != torch.int32:
        return None
    try:
        return checkpoint.format.codes(parts)
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        raise Failure(
            f"{checkpoint.path}: the parts of {module} do not fit together ({error}): a damaged file"
        ) from error


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str, told: _Told) -> torch.Tensor:
    """Returns a weight in another type; counts what it does not hold."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    told.plain += tensor.numel()
    if cast.dtype != tensor.dtype:
        told.changed += int((cast.to(tensor.dtype) != tensor).sum())
        if not cast.isfinite().all() and tensor.isfinite().all():
            raise RequestError(f"{name} has weights beyond the largest of {dtype}: set dtype: bfloat16 or float32")
    return cast


def _facts(told: _Told, checkpoint: Checkpoint, dtype: str, context: Context) -> dict[str, Any]:
    """Returns the facts, and warns of all that is not exact."""
    facts: dict[str, Any] = {"dtype": dtype}
    if told.changed:
        context.warnings.append(f"{told.changed / told.plain:.3g} of the plain weights were rounded to {dtype}")
    if isinstance(checkpoint, Unpacked):
        codes = {"kept": told.kept, "unpacked": told.unpacked}
        facts |= {"weights": f"kept from {checkpoint.method}", "codes": codes, "off_by_steps": told.off}
        if told.off:
            context.warnings.append(
                f"scales and biases in {dtype} move kept weights by up to {told.off:.2g} of a step: dtype: float32 "
                "moves none"
            )
        if told.unpacked:
            context.warnings.append(
                f"{told.unpacked} linears of this {checkpoint.method} model have no form in MLX: they were unpacked"
            )
    if told.modules:
        facts["modules"] = mlx_config.counted(told.modules)
    return facts
