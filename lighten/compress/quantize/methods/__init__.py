"""The quantization methods: each has a file here with its settings, and one row."""

from __future__ import annotations

from lighten.plugins import Table

METHODS = Table(
    "quantization method",
    "lighten.methods",
    {
        "gptq": f"{__name__}.gptq:Gptq",
        "rtn": f"{__name__}.rtn:Rtn",
        "awq": f"{__name__}.awq:Awq",
        "nf4": f"{__name__}.nf4:Nf4",
        "fp4": f"{__name__}.fp4:Fp4",
        "int8": f"{__name__}.int8:Int8",
        "int8-dynamic": f"{__name__}.int8_dynamic:Int8Dynamic",
        "w8a8": f"{__name__}.w8a8:W8a8",
        "fp8": f"{__name__}.fp8:Fp8",
        "mxfp4": f"{__name__}.mxfp4:Mxfp4",
        "nvfp4": f"{__name__}.nvfp4:Nvfp4",
    },
    base="lighten.compress.quantize.settings:Quantize",
    key="method",
)
"""Settings class of each method, "module:Class". Installed packages add theirs by the group `lighten.methods`."""
