"""Writing a model whose layers are made by workers: each leaves a part, and the parts are joined in order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter
from lighten.process.workers import ordered

Add = Callable[[str, torch.Tensor], None]


def write_layers(
    writer: ShardWriter,
    out: Path,
    count: int,
    workers: int,
    make: Callable[[int, Add], Any],
    tensors: int,
    report: Callable[[int], None],
) -> Iterator[Any]:
    """Calls `make(index, add)` for every layer in workers; yields what it returns, once its tensors are written.

    Args:
        writer: where all tensors end up.
        out: directory for the parts.
        count: layers.
        workers: processes.
        make: hands the tensors of a layer to `add`, and returns what JSON can hold.
        tensors: at most as many in a layer.
        report: told how many layers are done.
    """
    parts = [out / f".layer-{index:05d}" for index in range(count)]

    def work(index: int) -> dict[str, Any]:
        names: list[str] = []
        parts[index].mkdir()
        with torch.inference_mode(), ShardWriter(parts[index], tensors) as part:

            def add(name: str, tensor: torch.Tensor) -> None:
                part.add(name, tensor)
                names.append(name)

            told = make(index, add)
        return {"names": names, "told": told}

    for part, answer in zip(parts, ordered(work, count, workers, report), strict=True):
        stored = Checkpoint(part, {})
        for name in answer["names"]:
            writer.add(name, stored.tensor(name))
        shutil.rmtree(part)
        yield answer["told"]
