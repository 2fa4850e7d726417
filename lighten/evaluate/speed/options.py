"""How transformers runs a model: the attention, the compilation, and the cache of keys and values.

Only functions that need torch import it, because a plan asks here what a machine lacks.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from lighten.evaluate.speed.settings import Options

ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
"""Names of the attentions in transformers."""
BACKENDS = {"optimum-quanto": "quanto", "hqq": "hqq"}
"""Packages that quantize a cache, in order of preference, and their names in transformers."""
COMPILERS = ("g++", "clang++", "c++")
BITS = 4


def lacking(options: Options, device: str) -> str | None:
    """Returns what this machine lacks for these options, and what to do; None if it lacks nothing."""
    if options.attention == "flash":
        if device == "cpu":
            return "flash attention runs on an NVIDIA GPU and this is the CPU: choose attention sdpa or eager"
        if not any(find_spec(module) for module in ("flash_attn", "kernels")):
            return "flash attention needs flash-attn or kernels, neither is installed: pip install flash-attn"
    if options.compile != "off":
        if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), *COMPILERS))):
            return "torch.compile needs a C++ compiler on the CPU, and there is none: install g++"
        if device != "cpu" and not find_spec("triton"):
            return "torch.compile needs triton on a GPU, which is not installed: pip install triton"
    if options.cache == "quantized" and not backend():
        return "a quantized cache needs optimum-quanto or hqq, neither is installed: pip install 'lighten[quanto]'"
    return None


def backend() -> str | None:
    """Returns transformers' name of the package that can quantize a cache; None if there is none."""
    for package, name in BACKENDS.items():
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return name
    return None


def compiled(model: Any, mode: str) -> Any:
    """Returns the compiled forward pass of the model. As in transformers, only the step of one token is compiled."""
    import torch
    from torch._inductor import config

    config.compile_threads = 1  # no processes besides the one that is measured
    return torch.compile(model.__call__, mode=None if mode == "default" else mode)


class Caches:
    """Makes caches of the keys and values of a text."""

    def __init__(self, config: Any, kind: str) -> None:
        """Of a model's config; `kind` is dynamic, static or quantized."""
        self._config = config
        self._kind = kind
        self._kept: Any = None
        self._shape = (0, 0)

    def empty(self, batch: int, tokens: int) -> Any:
        """Returns an empty cache for `batch` texts of `tokens` each; None lets transformers make its own.

        A static cache is reused while it is large enough, because compiled code refers to it.
        """
        if self._kind == "static":
            from transformers import StaticCache

            if self._shape[0] != batch or self._shape[1] < tokens:
                self._kept, self._shape = StaticCache(config=self._config, max_cache_len=tokens), (batch, tokens)
            else:
                self._kept.reset()
            return self._kept
        if self._kind == "quantized":
            from transformers import QuantizedCache

            return QuantizedCache(backend(), config=self._config, nbits=BITS)
        return None
