"""Rounding by MLX itself: to its grid of codes with scale and bias, or to MXFP4.

mlx_lm's class of a family says which modules can be quantized, and which of them take other widths, such as routers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lighten.errors import Failure, RequestError, missing_extra
from lighten.export.mlx import config as mlx_config
from lighten.export.mlx.codes import Kept
from lighten.export.mlx.settings import DEFAULT_GROUP, Mlx
from lighten.model.anatomy import HEAD
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context

PURPOSE = "rounding to the grid of MLX"


def write(step: Mlx, checkpoint: Checkpoint, out: Path, context: Context) -> dict[str, Any]:
    """Writes an unquantized model with rounded weights into the existing directory `out`, and returns facts.

    Raises:
        RequestError: MLX is missing, or groups do not divide rows.
        Failure: mlx_lm cannot load the model.
    """
    try:
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_map_with_path
        from mlx_lm.utils import load_model, save_model
    except ImportError as error:
        raise missing_extra("mlx", (error.name or "mlx_lm").partition(".")[0], PURPOSE) from error
    context.report(0, 3, "opening")
    config = mlx_config.completed(checkpoint, context.trust_remote_code)
    try:
        model, _ = load_model(checkpoint.path, lazy=True, model_config=config)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise Failure(f"mlx_lm cannot load {checkpoint.path}: {' '.join(str(error).split())[:400]}") from error
    name = step.dtype or str(checkpoint.config.get("dtype") or "bfloat16")
    to = getattr(mx, name)
    takes = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, values: Any) -> Any:
        return values.astype(to) if takes(path) and mx.issubdtype(values.dtype, mx.floating) else values

    model.update(tree_map_with_path(cast, model.parameters()))
    chosen = _choose(step, model, nn)
    context.report(1, 3, "rounding")
    nn.quantize(model, class_predicate=lambda path, _: chosen.get(path, False))
    context.report(2, 3, "writing")
    save_model(out, model, donate_model=True)
    config["dtype"] = name
    mlx_config.write_others(checkpoint, out, mlx_config.with_quantization(config, chosen))
    return {"dtype": name, "weights": "rounded by MLX", "modules": mlx_config.counted(chosen)}


def _choose(step: Mlx, model: Any, nn: Any) -> dict[str, dict[str, Any]]:
    """Returns `group_size`, `bits` and `mode` of each module that is to be rounded."""
    bits, group = step.widths
    usual = {"group_size": group, "bits": bits, "mode": step.mode or "affine"}
    of_family = getattr(model, "quant_predicate", None)
    chosen, odd = {}, []
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        wanted: Any = usual
        if isinstance(module, nn.Embedding) or path.rpartition(".")[2] == HEAD:
            wanted = _of_tables(step, usual)
        elif of_family is not None:
            said = of_family(path, module)
            wanted = {**usual, **said} if isinstance(said, dict) else usual if said else None
        if wanted is None:
            continue
        row = module.weight.shape[-1]
        if row % wanted["group_size"]:  # the family's own group; its bits stay
            wanted = {**wanted, "group_size": group}
        if row % wanted["group_size"]:
            odd.append(f"{path} ({row})")
        chosen[path] = wanted
    if odd:
        raise RequestError(
            f"groups of {group} do not divide the rows of {', '.join(odd[:4])}: take a smaller group_size"
        )
    return chosen


def _of_tables(step: Mlx, usual: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the settings of embedding and head; None if they are not rounded."""
    if step.embedding == "float":
        return None
    if step.embedding_bits is None:
        return usual
    return {"group_size": step.group_size or DEFAULT_GROUP, "bits": step.embedding_bits, "mode": "affine"}


def packed_table(table: torch.Tensor, bits: int, group: int) -> Kept:
    """Returns an embedding or a head `[rows, in]` rounded by MLX.

    Raises:
        RequestError: MLX is missing.
    """
    try:
        import mlx.core as mx
    except ImportError as error:
        raise missing_extra("mlx", "mlx", PURPOSE) from error
    weight, *rest = mx.quantize(mx.array(table.float().numpy()), group_size=group, bits=bits)
    scales, biases = (torch.from_numpy(np.array(each)).to(table.dtype) for each in rest)
    words = torch.from_numpy(np.array(weight).view(np.int32)).view(torch.uint32)
    return Kept(
        {"weight": words, "scales": scales, "biases": biases}, {"group_size": group, "bits": bits, "mode": "affine"}
    )
