"""The format of bitsandbytes: NF4 and FP4 (QLoRA), and LLM.int8()."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lighten.model.quantized.packed import Packed, Parts, Shapes

_STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytes(Packed):
    """Linears in the format of bitsandbytes."""

    def linears(self, names: Iterable[str]) -> list[str]:
        """Returns the quantized linears."""
        found = []
        for name in names:
            if name.endswith(".SCB"):
                found.append(name.removesuffix(".SCB"))
            elif _STATE in name:
                found.append(name[: name.index(_STATE) - 1])
        return found

    def weight(self, parts: Parts) -> torch.Tensor:
        """Returns the weight of a linear, `[out, in]` in float32."""
        if "SCB" in parts:  # the largest value of every output stands for 127
            return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127.0)
        return _four_bit(parts)

    def shape(self, linear: str, stored: Shapes, read: Callable[[str], torch.Tensor]) -> tuple[int, ...]:
        """Returns `[out, in]` of a linear."""
        state = next((name for name in stored if name.startswith(f"{linear}.{_STATE}")), None)
        return tuple(_state(read(state))["shape"]) if state else stored[f"{linear}.weight"]


def _state(raw: torch.Tensor) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(raw.tolist()).decode())
    return state


def _four_bit(parts: Parts) -> torch.Tensor:
    """Unpacks NF4 and FP4: two codes a byte, the first one in the upper half."""
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
