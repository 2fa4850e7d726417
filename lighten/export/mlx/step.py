"""The `export` step for MLX: a directory with packed or plain weights under the names that mlx_lm reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.export.mlx import families, plain, proof, rounding
from lighten.export.mlx.groups import check_groups
from lighten.export.mlx.settings import Mlx
from lighten.model.checkpoint import Checkpoint
from lighten.model.files import read_json
from lighten.step import Context
from lighten.store.artifact import Artifact


def run(step: Mlx, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the directory and returns its facts.

    Raises:
        RequestError: MLX has no form of the source, or a package is missing.
        Failure: mlx_lm does not open what was written.
    """
    checkpoint = Checkpoint(source.path)
    step.check(checkpoint.facts)
    step.check_source(source.format, checkpoint.facts)
    families.check(checkpoint.config)
    if checkpoint.quantization:
        check_groups(checkpoint)
    facts = (
        rounding.write(step, checkpoint, out, context) if step.rounds else plain.write(step, source.path, out, context)
    )
    context.warnings += proof.opened(out, read_json(out / "config.json"))
    return {"format": "mlx", **facts}
