"""What survives a kill of a training: its newest checkpoint, and the best weights so far."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lighten.store.files import flush
from lighten.store.links import link_or_copy

T = TypeVar("T")
Told = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class Checkpoints:
    """The directory of a training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = folder / "best.safetensors"

    def keep_best(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes the best weights."""
        _save(self.best, tensors)

    def save(self, done: int, told: Told, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes a checkpoint after step `done` beside the last one, then removes the last one."""
        part = self.folder / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        _save(part / "state.safetensors", tensors)
        (part / "state.json").write_text(json.dumps(told))
        if self.best.exists():
            link_or_copy(self.best, part / self.best.name)
        for file in part.iterdir():
            flush(file)
        whole = self.folder / f"checkpoint-{done:08d}"
        part.rename(whole)
        for old in self._all():
            if old != whole:
                shutil.rmtree(old)

    def load(self, read: Callable[[Told, Tensors], T], warnings: list[str]) -> T | None:
        """Returns what `read` makes of the newest checkpoint; None if there is none, or it cannot be read.

        The best weights are then those of that step. A checkpoint that cannot be read is removed, with a warning.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found = self._all()
        if not found:
            return None
        try:
            made = read(json.loads((found[-1] / "state.json").read_text()), load_file(found[-1] / "state.safetensors"))
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            for each in found:
                shutil.rmtree(each)
            warnings.append(
                f"the checkpoint {found[-1].name} could not be read ({type(error).__name__}: {error}), so the training "
                "began anew"
            )
            return None
        self.best.unlink(missing_ok=True)
        if (found[-1] / self.best.name).exists():
            link_or_copy(found[-1] / self.best.name, self.best)
        return made

    def last(self) -> str:
        """Returns a sentence about the newest checkpoint."""
        found = self._all()
        if not found:
            return "There is no checkpoint before it."
        return f"The last good checkpoint is of step {int(found[-1].name.rpartition('-')[2])}, in {found[-1]}."

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))


def of_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Returns the state of an optimizer as tensors by name."""
    state = optimizer.state_dict()["state"]
    return {f"adam.{number}.{name}": tensor for number, entry in state.items() for name, tensor in entry.items()}


def into_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Takes over the result of `of_optimizer`, among other tensors."""
    adam: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".")
            adam.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": adam, "param_groups": optimizer.state_dict()["param_groups"]})


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    scratch = file.with_name(f".{file.name}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch)
    os.replace(scratch, file)
