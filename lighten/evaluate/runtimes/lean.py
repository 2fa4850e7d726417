"""A model that computes in float32 while its weights stay in their stored 16 bits.

Each module's weights become float32 while it computes. The results are those of the float32 model, because float32
holds every value of 16 bits. The model takes half the memory, and a conversion for every batch. If weights are mapped
from their file, it takes less: the pages of a linear layer are given back once it has computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lighten.model.checkpoint import Checkpoint
from lighten.model.mapped import Mapped

if TYPE_CHECKING:
    from lighten.evaluate.runtimes.torch import TorchRuntime

SHORT = (torch.bfloat16, torch.float16)
STORED = {"BF16": "bfloat16", "F16": "float16"}
PIECE = 1 << 22
"""Number of weights of a linear layer that are float32 at a time."""


def stored_short(path: Path) -> str | None:
    """Returns the 16-bit type in which every weight of a model directory is stored; None if there are several types.

    None also if weights are packed by a quantization.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.quantization:
        return None
    types = set()
    for file in set(checkpoint.weight_map.values()):
        with safe_open(checkpoint.path / file, framework="pt") as shard:
            types |= {shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118
    return STORED.get(types.pop()) if len(types) == 1 else None


def open_lean(path: Path, dtype: str, *, trust_remote_code: bool = False) -> TorchRuntime:
    """Opens a model directory on the CPU whose weights are stored in `dtype`. Raises the errors of `TorchRuntime`."""
    from lighten.evaluate.runtimes.torch import TorchRuntime

    runtime = TorchRuntime(path, "cpu", dtype, trust_remote_code)
    mapped = Mapped(runtime.model.parameters())
    for module in runtime.model.modules():
        if type(module) is nn.Embedding:
            module.register_forward_hook(lambda _module, _inputs, rows: rows.float())
        elif type(module) is nn.Linear:
            module.__dict__["forward"] = _Product(module, mapped)
        elif any(each.dtype in SHORT for each in module.parameters(recurse=False)):
            _Widened(module)
    runtime.dtype = "float32"
    return runtime


class _Product:
    """The forward pass of a linear layer, some of its rows after the other."""

    def __init__(self, linear: nn.Linear, mapped: Mapped) -> None:
        self.mapped = mapped
        self.weight, self.bias = linear.weight.data, None if linear.bias is None else linear.bias.data.float()
        self.rows = max(1, PIECE // self.weight.shape[1])

    def __call__(self, inputs: Tensor) -> Tensor:
        """Returns inputs `[..., in]` times the transposed weight, plus the bias."""
        out = inputs.new_empty(*inputs.shape[:-1], len(self.weight))
        for start in range(0, len(self.weight), self.rows):
            rows = slice(start, start + self.rows)
            out[..., rows] = inputs @ self.weight[rows].float().t()
            self.mapped.give_back(self.weight[rows])
        return out if self.bias is None else out.add_(self.bias)


class _Widened:
    """Makes the weights of a module itself float32 before it computes, and puts them back afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.kept: dict[str, Tensor] = {}
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, _inputs: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in SHORT:
                self.kept[name] = parameter.data
                parameter.data = parameter.data.float()

    def _after(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name in self.kept:
                parameter.data = self.kept.pop(name)
