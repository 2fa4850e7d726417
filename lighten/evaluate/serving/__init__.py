"""Servers that lighten starts, to measure an artifact in the program that will serve it."""

from __future__ import annotations

from lighten.plugins import Table

SERVERS = Table(
    "server",
    "lighten.servers",
    {
        "llama.cpp": f"{__name__}.llama_cpp:LlamaCpp",
        "transformers": f"{__name__}.transformers:Transformers",
        "vllm": f"{__name__}.vllm:Vllm",
        "mlx": f"{__name__}.mlx:Mlx",
    },
    base=f"{__name__}.program:Program",
    key="name",
)
"""What starts each server, "module:Class". Installed packages add theirs by the group `lighten.servers`."""
