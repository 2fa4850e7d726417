"""The `quantization_config` that the loaders of each format read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


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


def awq_config(bits: int, group_size: int, kept: Collection[str]) -> dict[str, Any]:
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
    groups: Sequence[tuple[dict[str, Any], Collection[str]]],
    activations: dict[str, Any] | None,
    layout: str,
    kept: Collection[str],
) -> dict[str, Any]:
    """Returns the configuration of compressed-tensors.

    Args:
        groups: the arguments of the weights, and their modules.
        activations: the arguments of the inputs, or None if they are not quantized.
        layout: `pack-quantized`, `int-quantized`, `float-quantized`, `mxfp4-pack-quantized` or `nvfp4-pack-quantized`.
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


def float_blocks(size: int, strategy: str, scales: str, *, dynamic: bool | str) -> dict[str, Any]:
    """Returns compressed-tensors' arguments of 4-bit floats in blocks.

    Args:
        size: numbers that share a scale.
        strategy: "tensor_group" if there is one scale for the whole tensor too, else "group".
        scales: type that the scales are stored in.
        dynamic: whether scales are made as the numbers come; "local" for those of blocks only.
    """
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": size,
        "dynamic": dynamic,
        "scale_dtype": scales,
    }


def mxfp4_config(kept: Collection[str]) -> dict[str, Any]:
    """Returns the configuration of gpt-oss in its own form; `kept` are the modules that were left alone."""
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(kept)}


def bnb_4bit_config(kind: str, double_quant: bool, kept: Collection[str]) -> dict[str, Any]:
    """Returns the configuration of bitsandbytes for "nf4" or "fp4"."""
    return {
        **_bnb_config(kept, four=True),
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def bnb_8bit_config(kept: Collection[str]) -> dict[str, Any]:
    """Returns the configuration of bitsandbytes for LLM.int8()."""
    return _bnb_config(kept, four=False)


def _bnb_config(kept: Collection[str], *, four: bool) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
