"""The `export` step for MLX: a directory with packed or plain weights under the names that mlx_lm reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.export.mlx import families, plain, rounding
from lighten.export.mlx.groups import check_groups
from lighten.export.mlx.settings import Mlx
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Mlx, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the directory and returns its facts.

    Raises:
        RequestError: MLX has no form of the source, or a package is missing.
    """
    checkpoint = Checkpoint(source.path)
    step.check(checkpoint.facts)
    step.check_source(source.format, checkpoint.facts)
    families.check(checkpoint.config)
    if checkpoint.quantization:
        check_groups(checkpoint)
    if not families.is_installed():
        context.warnings.append("mlx_lm is not here: whether it knows this family, and loads the directory, was not tried")
    if step.rounds:
        return {"format": "mlx", **rounding.write(step, checkpoint, out, context)}
    return {"format": "mlx", **plain.write(step, source.path, out, context)}
