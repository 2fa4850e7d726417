"""Quantized checkpoints read as plain ones: one weight at a time, on the CPU, without their own packages."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.formats import FORMATS, MXFP4

if TYPE_CHECKING:
    import torch

    from lighten.model.quantized.packed import Packed


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns a model directory whose tensors are plain, whatever their stored format.

    Raises:
        RequestError: its quantized format cannot be unpacked here.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.quantization:
        return checkpoint
    if checkpoint.quantization.get("quant_method") == MXFP4:
        from lighten.model.quantized.mxfp4 import Mxfp4Checkpoint

        return Mxfp4Checkpoint(path)
    return Unpacked(path, checkpoint.config)


class Unpacked(Checkpoint):
    """A quantized model directory. `X.weight` is the value of the stored parts of linear X, float32 `[out, in]`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """Opens the directory.

        Raises:
            RequestError: its format cannot be unpacked here.
        """
        super().__init__(path, config)
        settings = self.quantization or {}
        self.method = str(settings.get("quant_method"))
        known = FORMATS.get(self.method)
        if known is None:
            raise self._refused("known are " + ", ".join(FORMATS))
        self.format: Packed = known.unpacked(settings)
        if reason := self.format.refusal():
            raise self._refused(reason)

    def _refused(self, reason: str) -> RequestError:
        return RequestError(
            f"{self.path} is quantized with {self.method}, which cannot be unpacked here ({reason}): "
            "export the model that it was made from"
        )

    @cached_property
    def packed(self) -> dict[str, None]:
        """Function that unpacks each quantized linear, by its name."""
        return dict.fromkeys(self.format.linears(list(self.weight_map)))

    def _is_part(self, name: str) -> str | None:
        """Returns the quantized linear that a stored tensor belongs to, None for one that is plain."""
        module = name.rpartition(".")[0]
        while module and module not in self.packed:
            module = module.rpartition(".")[0]
        return module if module and not name.endswith(".bias") else None

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor on the CPU. A quantized weight is in float32."""
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or module not in self.packed:
            return super().tensor(name)
        try:
            return self.format.weight(self.tensors(f"{module}."))
        except ValueError as error:
            raise Failure(f"{self.path}: {module} cannot be unpacked, for {error}: a damaged file") from error
        except (KeyError, RuntimeError, IndexError) as error:
            raise Failure(
                f"{self.path}: the parts of {module} do not fit together ({error}): a damaged file"
            ) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that exists once the linears are unpacked."""
        stored = super().shapes()
        found = {name: shape for name, shape in stored.items() if self._is_part(name) is None}
        for module in self.packed:
            found[f"{module}.weight"] = self.format.shape(module, stored, super().tensor)
        return found
