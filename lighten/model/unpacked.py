"""Quantized checkpoints read as if they were not: one weight at a time, on the CPU, without their own packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    Parts = dict[str, torch.Tensor]

_STATE = "weight.quant_state.bitsandbytes__"
_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns a model directory whose tensors are plain, whatever format they are stored in.

    Raises:
        RequestError: a quantized format that cannot be unpacked here.
    """
    checkpoint = Checkpoint(path)
    return Unpacked(path, checkpoint.config) if checkpoint.quantization else checkpoint


class Unpacked(Checkpoint):
    """A quantized model directory: `X.weight` is what the stored parts of linear X stand for, float32 `[out, in]`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """Opens the directory.

        Raises:
            RequestError: its format cannot be unpacked here.
        """
        super().__init__(path, config)
        self.method = str((self.quantization or {}).get("quant_method"))
        self._check()

    def _check(self) -> None:
        settings = self.quantization or {}
        reason = None
        if self.method == "gptq" and settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
            reason = f"checkpoint_format {settings['checkpoint_format']}"
        if self.method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
            reason = f"version {settings['version']}"
        if self.method == "compressed-tensors":
            groups = settings.get("config_groups") or {}
            found = {str(group.get("format") or settings.get("format")) for group in groups.values()}
            reason = next((f"format {layout}" for layout in sorted(found - set(_LAYOUTS))), None)
            weights = [group.get("weights") or {} for group in groups.values()]
            if any(each.get("strategy") in ("block", "tensor_group") for each in weights):
                reason = "scales of blocks"
            if settings.get("transform_config"):
                reason = "its inputs are rotated (transform_config)"
        known = ("gptq", "awq", "bitsandbytes", "compressed-tensors")
        if self.method not in known:
            reason = "known are " + ", ".join(known)
        if reason:
            raise RequestError(
                f"{self.path} is quantized with {self.method}, which cannot be unpacked here ({reason}): "
                "export the model that it was made from"
            )

    @cached_property
    def packed(self) -> dict[str, Callable[[Parts], torch.Tensor]]:
        """What unpacks each quantized linear, by its name."""
        found: dict[str, Callable[[Parts], torch.Tensor]] = {}
        for name in self.weight_map:
            module, _, part = name.rpartition(".")
            if part == "qweight":
                found[module] = self._gptq if self.method == "gptq" else self._awq
            elif part == "weight_packed":
                found[module] = _packed
            elif part == "SCB":
                found[module] = _int8
            elif part == "weight_scale" and f"{module}.weight" in self.weight_map:
                found[module] = _scaled
            elif _STATE in name:
                found[name[: name.index(_STATE) - 1]] = _four_bit
        return found

    def _is_part(self, name: str) -> str | None:
        """Returns the quantized linear that a stored tensor belongs to, None for one that is plain."""
        module = name.rpartition(".")[0]
        while module and module not in self.packed:
            module = module.rpartition(".")[0]
        return module if module and not name.endswith(".bias") else None

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU; a quantized weight in float32."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self.packed:
            return super().tensor(name)
        try:
            return self.packed[module](self.tensors(f"{module}."))
        except (KeyError, RuntimeError, IndexError) as error:
            raise Failure(
                f"{self.path}: the parts of {module} do not fit together ({error}): a damaged file"
            ) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that there is once the linears are unpacked."""
        stored = super().shapes()
        found = {name: shape for name, shape in stored.items() if self._is_part(name) is None}
        for module in self.packed:
            found[f"{module}.weight"] = self._shape(module, stored)
        return found

    def _shape(self, module: str, stored: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns `[out, in]` of a quantized linear, from headers and small tensors only."""
        if (words := stored.get(f"{module}.qweight")) is not None:
            if self.method == "awq":
                return (words[1] * 8, words[0])
            grouped = stored.get(f"{module}.g_idx")
            return (words[1], grouped[0] if grouped else words[0] * 32 // self._bits())
        if f"{module}.weight_packed" in stored:
            return tuple(int(size) for size in super().tensor(f"{module}.weight_shape"))
        state = next((name for name in stored if name.startswith(f"{module}.{_STATE}")), None)
        return tuple(_state(super().tensor(state))["shape"]) if state else stored[f"{module}.weight"]

    def _bits(self) -> int:
        return int((self.quantization or {})["bits"])

    def _gptq(self, parts: Parts) -> torch.Tensor:
        import torch

        from lighten.model.packing import unpack_gptq

        settings = self.quantization or {}
        if "g_idx" not in parts:
            inputs = parts["qweight"].shape[0] * 32 // self._bits()
            parts["g_idx"] = torch.arange(inputs) // (inputs // len(parts["scales"]))
        return unpack_gptq(parts, less_one=settings.get("checkpoint_format") != "gptq_v2")

    @staticmethod
    def _awq(parts: Parts) -> torch.Tensor:
        from lighten.model.packing import unpack_awq

        return unpack_awq(parts)


def _packed(parts: Parts) -> torch.Tensor:
    """Unpacks the `pack-quantized` format of compressed-tensors."""
    import torch

    from lighten.model.packing import unpack

    rows, columns = (int(size) for size in parts["weight_shape"])
    bits = parts["weight_packed"].shape[1] * 32 // columns
    codes = unpack(parts["weight_packed"].t().contiguous(), bits, columns).t()
    scales = parts["weight_scale"].float()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"], bits, rows).float()
    return _spread(codes - _columns(zeros, columns, parts), scales, parts)


def _scaled(parts: Parts) -> torch.Tensor:
    """Unpacks integers or 8-bit floats with a scale per output, per group of inputs or for all."""
    codes = parts["weight"].float()
    if "weight_zero_point" in parts:
        codes = codes - _columns(parts["weight_zero_point"].float(), codes.shape[1], parts)
    return _spread(codes, parts["weight_scale"].float(), parts)


def _spread(codes: torch.Tensor, scales: torch.Tensor, parts: Parts) -> torch.Tensor:
    return codes.float() * _columns(scales, codes.shape[1], parts)


def _columns(values: torch.Tensor, inputs: int, parts: Parts) -> torch.Tensor:
    """Returns values of groups of inputs `[out or 1, groups]` as values of inputs."""
    if values.dim() < 2 or values.shape[1] == 1:
        return values
    if "weight_g_idx" in parts:
        return values[:, parts["weight_g_idx"].long()]
    return values.repeat_interleave(inputs // values.shape[1], 1)


def _int8(parts: Parts) -> torch.Tensor:
    """Unpacks LLM.int8(): the largest value of every output stands for 127."""
    return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127.0)


def _state(raw: torch.Tensor) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(raw.tolist()).decode())
    return state


def _four_bit(parts: Parts) -> torch.Tensor:
    """Unpacks NF4 and FP4 of bitsandbytes (QLoRA): two codes a byte, the first one in the upper half."""
    import torch

    state = _state(next(raw for name, raw in parts.items() if name.startswith(_STATE)))
    packed = parts["weight"].contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    largest = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))[: largest.numel()]
        largest = parts["weight.nested_quant_map"][largest.long()] * nested + float(state["nested_offset"])
    values = parts["weight.quant_map"][codes]
    spread = largest.float().repeat_interleave(int(state["blocksize"]))[: values.numel()]
    shape = [int(size) for size in state["shape"]]
    return (values * spread)[: shape[0] * shape[1]].reshape(shape)
