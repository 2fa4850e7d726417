"""The dependence of the loss on the outputs of each linear, which a sensitivity stage writes and every budget reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lighten.errors import Failure

FILE = "sensitivity.json"
HEAD = "head.safetensors"


@dataclass(frozen=True)
class Sensitivity:
    """Mean squares of the loss's derivatives, and second moments that the sweep does not see."""

    outputs: dict[str, float]
    """Mean over tokens and channels of (∂loss / ∂output)², by module; also of the embedding and the head."""
    head_gram: torch.Tensor
    """XᵀX of the inputs of the head, `[hidden, hidden]`."""
    counts: torch.Tensor
    """Number of times that each token of the vocabulary occurred, `[vocab]`."""
    tokens: int
    heads: dict[str, list[float]] = field(default_factory=dict)
    """By layer: for every query head the mean over tokens of |x · ∂loss / ∂x|, x being what it gives the projection."""

    def write(self, folder: Path) -> None:
        """Writes it into a directory."""
        save_file({"gram": self.head_gram.contiguous(), "counts": self.counts}, folder / HEAD)
        value = {"tokens": self.tokens, "outputs": self.outputs, "heads": self.heads}
        (folder / FILE).write_text(json.dumps(value, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Sensitivity:
        """Reads what `write` wrote."""
        try:
            value = json.loads((folder / FILE).read_text())
            tensors = load_file(folder / HEAD)
            return Sensitivity(value["outputs"], tensors["gram"], tensors["counts"], value["tokens"], value["heads"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise Failure(f"{folder} does not hold the sensitivities of a model: {error}") from error
