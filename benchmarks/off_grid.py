"""The same function with other weights: random channel scales, moved from linears into what makes their inputs.

Weights that were quantized once lie on a grid, which flatters whatever uses that grid again. A scale that goes into the
columns of a linear and out of the norm or linear before it leaves the function as it is and the weights on no grid.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lighten.compress.quantize.fold import exact, fold
from lighten.model.blockwise import known_anatomy, known_folds
from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter
from lighten.store.files import MANIFEST

SPREAD = 0.35
"""Half the width of the scales' logarithms."""


def moved_off_grid(model: Path, moved: Path) -> Path:
    """Returns `moved`, the directory of a model off its grid; it is written if it is not there as a whole."""
    if not moved.is_dir():
        part = moved.with_name(f"{moved.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_off_grid(model, part)
        part.rename(moved)
    return moved


def write_off_grid(model: Path, out: Path) -> int:
    """Writes a model directory of any family with its linears moved off their grid; returns how many moved.

    Args:
        model: a Hugging Face directory.
        out: an empty directory. Layers are written in bfloat16.
    """
    checkpoint = Checkpoint(model)
    anatomy = known_anatomy(checkpoint, None)
    folds = known_folds(checkpoint, anatomy)
    head_dim = checkpoint.facts.head_dim
    generator = torch.Generator().manual_seed(1)
    for file in model.iterdir():
        if file.suffix != ".safetensors" and file.name not in (MANIFEST, "model.safetensors.index.json"):
            shutil.copyfile(file, out / file.name)
    moved = 0
    inside = {name for name in checkpoint.weight_map for layer in anatomy.layers if name.startswith(layer.prefix)}
    with ShardWriter(out, len(checkpoint.weight_map)) as writer:
        for name in checkpoint.weight_map:
            if name not in inside:
                writer.add(name, checkpoint.tensor(name))
        for layer in anatomy.layers:
            tensors = checkpoint.tensors(layer.prefix)
            for place in folds.get(layer.kind, ()):
                width = tensors[f"{place.linears[0]}.weight"].shape[1]
                scale = ((torch.rand(width, generator=generator) * 2 - 1) * SPREAD).exp()
                if place.repeats > 1:  # heads that repeat a channel share its scale
                    heads = scale.view(-1, place.repeats, head_dim)[:, :1]
                    scale = heads.expand(-1, place.repeats, -1).reshape(-1)
                fold(tensors, place, exact(scale, tensors, place), head_dim)
                moved += len(place.linears)
            for name, tensor in tensors.items():
                writer.add(layer.prefix + name, tensor.bfloat16())
    return moved
