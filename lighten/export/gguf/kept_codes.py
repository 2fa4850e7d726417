"""Codes of a quantized source that a GGUF file keeps, where llama.cpp would round their values a second time.

A block of 32 weights with one step holds any whole numbers that its codes reach: Q4_0 those from −8 to 7, Q8_0 those
from −128 to 127, Q4_1 and Q5_1 any that are at most 15 or 31 apart. So groups of 32, or of a multiple of 32, fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from lighten.export.gguf.linears import matrices
from lighten.export.gguf.write import Draft
from lighten.model.gguf.blocks import KINDS, Grid, Kind, pack
from lighten.model.gguf_header import read_header
from lighten.model.unpacked import Unpacked

NEAR = 1e-3
"""Difference from a whole number, in steps, that is the rounding of float32."""


def keep_codes(file: Path, draft: Draft) -> dict[str, Any]:
    """Writes the codes of a quantized source into a file that llama.cpp has quantized, in place, where they fit.

    Args:
        file: made of `draft`.
        draft: of the quantized source.

    Returns:
        The facts: how many quantized matrices keep their codes, and how many are rounded twice. Nothing for a source
        without codes.
    """
    tensors, kept, twice = read_header(file).tensors, 0, 0
    for label in matrices(draft):
        steps = _steps(draft, label)
        if steps is None:
            continue
        tensor = tensors[draft.names[label]]
        kind = KINDS.get(GGMLQuantizationType(tensor.type).name)
        grid = on_grid(draft.weight(label).float(), steps, kind) if kind and len(steps) else None
        if grid is None:
            twice += 1
            continue
        with file.open("r+b") as opened:
            opened.seek(tensor.start)
            opened.write(pack(grid).numpy().tobytes())
        kept += 1
    return {"codes": {"kept": kept, "rounded_twice": twice}} if kept or twice else {}


def on_grid(weight: torch.Tensor, steps: torch.Tensor, kind: Kind) -> Grid | None:
    """Returns the blocks of a matrix whose weights are whole numbers of steps; None if the type cannot hold them.

    Args:
        weight: `[out, in]`, float32.
        steps: of every weight, `[out, in]`, float32.
        kind: layout of the type.
    """
    if kind.numbers or not kind.even:
        return None
    blocks, each = (values.reshape(len(weight), -1, kind.block) for values in (weight, steps))
    step = each[..., :1]
    exact = blocks / torch.where(step == 0, 1.0, step)
    whole = exact.round()
    lowest = whole.amin(-1, keepdim=True) if kind.has_mins else torch.full_like(step, kind.levels[0])
    codes, d = whole - lowest, step.half()
    held = (d.float() - step).abs() <= step.abs() * 2**-10
    fits = (each == step).all() and held.all() and ((exact - whole).abs() < NEAR).all()
    if not fits or codes.amin() < 0 or codes.amax() > len(kind.levels) - 1:
        return None
    least = (step * lowest if kind.has_mins else torch.zeros_like(step)).half()
    ones = torch.ones(step.shape[:2], dtype=torch.int16)
    return Grid(kind, codes.byte().flatten(1), ones, -ones, d[..., 0], least[..., 0])


def _steps(draft: Draft, label: str) -> torch.Tensor | None:
    """Returns the steps of a matrix's weights `[out, in]`; none if they have no place, None without codes."""
    checkpoint, piece = draft.checkpoint.checkpoint, draft.pieces[label]
    if not isinstance(checkpoint, Unpacked) or len(piece.stored) != 1:
        return None
    module = draft.checkpoint.stored(piece.stored[0]).removesuffix(".weight")
    if module not in checkpoint.packed:
        return None
    steps, turn = checkpoint.format.steps(checkpoint.tensors(f"{module}.")), piece.place.rule.turn
    if steps is None or not turn.exact:
        return torch.zeros(0)
    return turn.there(steps, draft.model)[piece.index]
