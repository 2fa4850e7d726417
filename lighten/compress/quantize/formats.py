"""How quantized linears are stored: the tensors of each format, and the `quantization_config` its loaders read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lighten.compress.quantize.grid import Quantized, storable
from lighten.model.packing import pack_awq, pack_compressed, pack_gptq

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Stored:
    """One linear as a format stores it."""

    tensors: dict[str, torch.Tensor]
    """By what follows the linear's name and a dot."""
    weight: torch.Tensor
    """What they stand for, `[out, in]`, float32."""


def gptq(found: Quantized, bits: int) -> Stored:
    """Stores codes in the `gptq` format."""
    return Stored(pack_gptq(found.codes, found.scales, found.zeros, found.g_idx, bits), found.weight())


def awq(found: Quantized) -> Stored:
    """Stores 4-bit codes in the `awq` GEMM format."""
    return Stored(pack_awq(found.codes, found.scales, found.zeros), found.weight())


def pack_quantized(found: Quantized, bits: int, sym: bool, kind: torch.dtype) -> Stored:
    """Stores codes in the `pack-quantized` format of compressed-tensors, scales in the model's own type."""
    return Stored(pack_compressed(found.codes, found.scales.to(kind), found.zeros, bits, sym), found.weight())


def int_quantized(found: Quantized, kind: torch.dtype) -> Stored:
    """Stores symmetric 8-bit codes with a scale per output in the `int-quantized` format of compressed-tensors."""
    signed = (found.codes.int() - 128).to(torch.int8).t().contiguous()
    return Stored({"weight": signed, "weight_scale": found.scales.t().to(kind).contiguous()}, found.weight())


def float_quantized(weight: torch.Tensor, kind: torch.dtype) -> Stored:
    """Rounds a weight to 8-bit floats with a scale per output, for the `float-quantized` format."""
    wide = weight.float()
    scale = storable(wide.abs().amax(1, keepdim=True) / FP8_LARGEST, kind)
    rounded = (wide / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    return Stored({"weight": rounded, "weight_scale": scale.to(kind)}, rounded.float() * scale)


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


def gptq_config(bits: int, group_size: int, sym: bool, desc_act: bool, damp_percent: float | None) -> dict[str, Any]:
    """Returns the configuration of the `gptq` format."""
    from lighten import __version__

    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        **({} if damp_percent is None else {"damp_percent": damp_percent}),
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"lighten:{__version__}"]},
    }


def awq_config(bits: int, group_size: int, kept: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration of the `awq` GEMM format; `kept` are the modules that were left alone."""
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(kept),
    }


def compressed_config(
    groups: Sequence[tuple[dict[str, Any], Sequence[str]]],
    activations: dict[str, Any] | None,
    layout: str,
    kept: Sequence[str],
) -> dict[str, Any]:
    """Returns the configuration of compressed-tensors.

    Args:
        groups: the arguments of the weights, and the modules they hold for.
        activations: the arguments of the inputs, or None where they are not quantized.
        layout: `pack-quantized`, `int-quantized` or `float-quantized`.
        kept: modules that were left alone.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": list(targets),
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
            for number, (weights, targets) in enumerate(groups)
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def integers(bits: int, group_size: int | str, sym: bool) -> dict[str, Any]:
    """Returns compressed-tensors' arguments of weights on an integer grid."""
    strategy = {"tensor": "tensor", -1: "channel"}.get(group_size, "group")
    size = group_size if strategy == "group" else None
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
    }


def per_token(kind: str) -> dict[str, Any]:
    """Returns compressed-tensors' arguments of 8-bit inputs, "int" or "float", scaled for every token as it comes."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}


def floats() -> dict[str, Any]:
    """Returns compressed-tensors' arguments of weights as 8-bit floats with a scale per output."""
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
    }


def bnb_config(kind: str, double_quant: bool, kept: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration of bitsandbytes for "nf4", "fp4" or "int8"."""
    four = kind != "int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        **(
            {
                "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": double_quant,
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
            }
            if four
            else {}
        ),
    }
