"""Writing a model whose layers workers make: each layer is a part, and the parts are joined in order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lighten.model.checkpoint import Checkpoint
from lighten.model.shards import ShardWriter


class Part:
    """The tensors of one layer on their way to disk."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self.names: list[str] = []
        """Names of the added tensors, in order."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor."""
        self._writer.add(name, tensor)
        self.names.append(name)


@contextmanager
def writing_part(out: Path, index: int, tensors: int) -> Iterator[Part]:
    """Opens the part of one layer. Meanwhile torch keeps no gradients.

    Args:
        out: directory of the model.
        index: number of the layer.
        tensors: maximum number of tensors of a layer.
    """
    (folder := _folder(out, index)).mkdir()
    with torch.inference_mode(), ShardWriter(folder, tensors) as writer:
        yield Part(writer)


def join(writer: ShardWriter, out: Path, index: int, names: list[str]) -> None:
    """Adds the tensors of a part to the model, in the order of `names`, and removes the part."""
    folder = _folder(out, index)
    stored = Checkpoint(folder, {})
    for name in names:
        writer.add(name, stored.tensor(name))
    shutil.rmtree(folder)


def _folder(out: Path, index: int) -> Path:
    return out / f".layer-{index:05d}"
