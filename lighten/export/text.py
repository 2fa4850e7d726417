"""The built-in text as tokens of the model that an export reads, where its tokenizer can read it."""

from __future__ import annotations

from pathlib import Path

import torch

from lighten.errors import LightenError
from lighten.facts import ModelFacts
from lighten.model.tokens import calibration_ids
from lighten.step import Context


def built_in(
    model: Path, facts: ModelFacts, shape: tuple[int, int], context: Context, otherwise: str
) -> torch.Tensor | None:
    """Returns tokens of the built-in text; None, with a warning, if the model's tokenizer cannot read it.

    Args:
        model: the model directory.
        facts: of the model, whose context may be shorter.
        shape: sequences, and tokens of each.
        context: takes the warning.
        otherwise: what is done without a text; the warning begins with it.
    """
    samples, length = shape
    try:
        ids = calibration_ids(model, "builtin", samples, min(length, facts.context or length))
    except LightenError as error:
        context.warnings.append(f"{otherwise}, as no text could be read: {error}")
        return None
    return torch.from_numpy(ids)
