"""The storage of quantized linears: the tensors of each format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lighten.compress.quantize.float_grid import FP8, FP8_LARGEST, Blocked
from lighten.compress.quantize.grid import Quantized, storable
from lighten.model import e2m1
from lighten.model.packing import pack_awq, pack_compressed, pack_gptq


@dataclass(frozen=True)
class Stored:
    """One linear in the form of a format."""

    tensors: dict[str, torch.Tensor]
    """Tensors by the rest of their name, after the linear's name and a dot."""
    weight: torch.Tensor
    """Weight that the tensors stand for, `[out, in]`, float32."""


def gptq(found: Quantized, bits: int) -> Stored:
    """Stores codes in the `gptq` format."""
    return Stored(pack_gptq(found.codes, found.scales, found.zeros, found.g_idx, bits), found.weight())


def awq(found: Quantized) -> Stored:
    """Stores 4-bit codes in the `awq` GEMM format."""
    return Stored(pack_awq(found.codes, found.scales, found.zeros), found.weight())


def pack_quantized(found: Quantized, bits: int, sym: bool, scale_type: torch.dtype) -> Stored:
    """Stores codes in the `pack-quantized` format of compressed-tensors, scales in the model's own type."""
    return Stored(pack_compressed(found.codes, found.scales.to(scale_type), found.zeros, bits, sym), found.weight())


def coded(format: str, bits: int, sym: bool, scale_type: torch.dtype, found: Quantized) -> Stored:
    """Stores codes in the `gptq` format, or in compressed-tensors."""
    return gptq(found, bits) if format == "gptq" else pack_quantized(found, bits, sym, scale_type)


def int_quantized(found: Quantized, scale_type: torch.dtype) -> Stored:
    """Stores symmetric 8-bit codes with a scale per output in the `int-quantized` format of compressed-tensors."""
    signed = (found.codes.int() - 128).to(torch.int8).t().contiguous()
    return Stored({"weight": signed, "weight_scale": found.scales.t().to(scale_type).contiguous()}, found.weight())


def float_quantized(weight: torch.Tensor, scale_type: torch.dtype) -> Stored:
    """Rounds a weight to 8-bit floats with a scale per output, for the `float-quantized` format."""
    wide = weight.float()
    scale = storable(wide.abs().amax(1, keepdim=True) / FP8_LARGEST, scale_type)
    rounded = (wide / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    return Stored({"weight": rounded, "weight_scale": scale.to(scale_type)}, rounded.float() * scale)


def float_blocks(found: Blocked, largest_input: float | None = None) -> Stored:
    """Stores 4-bit floats in the `mxfp4-pack-quantized` or `nvfp4-pack-quantized` format of compressed-tensors.

    compressed-tensors keeps what scales were multiplied by, `weight_global_scale` and, if inputs are rounded too,
    `input_global_scale`. With the latter the largest input has the largest scale in E4M3 and the largest code.
    """
    tensors = {
        "weight_packed": e2m1.pack(e2m1.codes_of(found.values.t().contiguous())),
        "weight_scale": found.scales.stored(found.numbers).t().contiguous(),
    }
    if found.scales.divisor is not None:
        tensors["weight_global_scale"] = torch.tensor([found.scales.divisor])
    if largest_input is not None:
        tensors["input_global_scale"] = torch.tensor([FP8_LARGEST * e2m1.LARGEST / (largest_input or 1.0)])
    return Stored(tensors, found.weight())


def bnb_4bit(weight: torch.Tensor, kind: str, block_size: int, double_quant: bool) -> Stored:
    """Rounds a weight with bitsandbytes to "nf4" or "fp4"."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=block_size, compress_statistics=double_quant, quant_type=kind
    )
    tensors = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return Stored(tensors, dequantize_4bit(packed, state).float())


def bnb_8bit(weight: torch.Tensor) -> Stored:
    """Rounds a weight per output to 8 bits as LLM.int8() does."""
    wide = weight.float()
    largest = wide.abs().amax(1).clamp(min=1e-12)
    codes = (wide * (127.0 / largest[:, None])).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Stored(tensors, codes.float() * (largest[:, None] / 127.0))
