"""A whole model of a quantized checkpoint, its weights unpacked here: for what no other loader opens.

transformers keeps experts in one tensor, and its loaders of quantized formats fill modules of single linears only. The
files have one matrix per expert, as vLLM reads them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.empty import Filler, compute_buffers, empty_model
from lighten.model.unpacked import Unpacked, open_checkpoint

_TWO_NUMBERS = re.compile(r"\.\d+\..*\.\d+\.")


def is_needed(path: Path, *, trust_remote_code: bool = False) -> bool:
    """Returns whether a quantized checkpoint has a quantized matrix that is no linear of its own in the model.

    It is one of an expert, or has its inputs before its outputs in the model (GPT-2).
    """
    try:
        checkpoint = open_checkpoint(path)
    except RequestError:  # only its own loader opens it
        return False
    if not isinstance(checkpoint, Unpacked):
        return False
    model = empty_model(checkpoint, torch.bfloat16, trust_remote_code=trust_remote_code)
    plain = {type(module).__name__ for module in model.modules()}
    if "Conv1D" not in plain and not any(_TWO_NUMBERS.search(name) for name in checkpoint.packed):
        return False
    filler = Filler(model, [f"{name}.weight" for name in checkpoint.packed])
    return any(name in filler.converted or filler.is_turned(name) for name in filler.places)


def may_be_needed(path: Path, *, trust_remote_code: bool = False) -> bool:
    """Returns whether that may become true of a plain model once it is quantized: it has such matrices."""
    model = empty_model(Checkpoint(path), torch.bfloat16, trust_remote_code=trust_remote_code)
    turned = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return turned or any("expert" in name for name, _ in model.named_parameters())


def load(path: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Returns the model on the CPU, every weight of it in one type.

    Raises:
        RequestError: its format cannot be unpacked here.
        Failure: tensors are missing, or have no place in the model.
    """
    return fill(open_checkpoint(path), dtype, trust_remote_code=trust_remote_code)


def fill(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Returns the model that the tensors of a checkpoint make, on the CPU, every weight of it in one type.

    Raises:
        Failure: tensors are missing, or have no place in the model.
    """
    model = empty_model(checkpoint, dtype, trust_remote_code=trust_remote_code)
    compute_buffers(model, "cpu")
    names = list(checkpoint.shapes())
    filler = Filler(model, names)
    if filler.surplus:
        raise Failure(f"{checkpoint.path} has {filler.surplus[0]}, for which its model has no place: is it damaged?")
    packed = checkpoint.packed if isinstance(checkpoint, Unpacked) else {}
    turned = {name for name in packed if filler.is_turned(f"{name}.weight")}

    def load_some(wanted: list[str]) -> None:
        tensors = {name: checkpoint.tensor(name) for name in wanted}
        for name in turned & {name.removesuffix(".weight") for name in wanted}:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].t().contiguous()
        filler.fill(tensors, "cpu")

    groups: dict[str, list[str]] = {}
    for name in names:  # what is converted together comes together
        groups.setdefault(filler.places[name].rpartition(".")[0], []).append(name)
    for group in groups.values():
        load_some(group)
    filler.tie(model, "", load_some)
    if lacking := filler.lacks(model):
        raise Failure(f"{checkpoint.path} lacks {', '.join(lacking[:3])}: is it complete?")
    return model
