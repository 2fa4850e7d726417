"""Storage formats: how to recognise each, and which extra brings its loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import RequestError
from lighten.model import llama_library
from lighten.model.files import check_links
from lighten.model.gguf_header import is_gguf, within
from lighten.model.onnx_source import genai
from lighten.plugins import found_at
from lighten.store.artifact import read_artifact
from lighten.store.files import MANIFEST

if TYPE_CHECKING:
    from lighten.model.quantized.packed import Packed


@dataclass(frozen=True)
class Format:
    """The way in which quantized linears are stored: transformers' `quant_method`."""

    packed: str
    """Class that unpacks it, "module:Class": a `Packed`."""
    extra: str
    """Extra that brings the packages with which transformers opens it."""
    loaded_with: tuple[str, ...]
    """Modules with which transformers opens it."""
    written_here: bool = True
    """Whether lighten writes it without these modules."""
    scales_like_model: bool = False
    """Whether scales are stored in the model's own type. It is float16 otherwise."""
    plain_kernels: tuple[str, str] | None = None
    """Settings class of transformers, and the backend whose kernels keep the tensors as they are stored."""
    unpacked_on_device: bool = False
    """Whether weights are unpacked on their device, and not on the CPU first."""
    codes_exported: bool = False
    """Whether exports to ONNX and OpenVINO take its codes unchanged."""

    @property
    def written_with(self) -> list[tuple[str, str]]:
        """Modules that must be installed to write it, and the extra that brings each."""
        return [] if self.written_here else [(module, self.extra) for module in self.loaded_with]

    @property
    def pip_names(self) -> tuple[str, ...]:
        """Packages that pip installs so that transformers opens it."""
        return ("transformers", *(module.replace("_", "-") for module in self.loaded_with))

    def unpacked(self, settings: Mapping[str, Any]) -> Packed:
        """Returns what unpacks the linears of a checkpoint with this `quantization_config`."""
        found: Packed = found_at(self.packed)(dict(settings))
        return found


FORMATS = {
    "gptq": Format(
        "lighten.model.quantized.gptq:Gptq",
        "gptq",
        ("gptqmodel", "optimum"),
        plain_kernels=("GPTQConfig", "torch"),
        codes_exported=True,
    ),
    "awq": Format(
        "lighten.model.quantized.awq:Awq",
        "gptq",
        ("gptqmodel", "optimum"),
        plain_kernels=("AwqConfig", "torch_awq"),
        codes_exported=True,
    ),
    "bitsandbytes": Format(
        "lighten.model.quantized.bitsandbytes:BitsAndBytes",
        "bnb",
        ("bitsandbytes", "accelerate"),
        written_here=False,
        unpacked_on_device=True,
    ),
    "compressed-tensors": Format(
        "lighten.model.quantized.compressed:Compressed",
        "compressed",
        ("compressed_tensors",),
        written_here=False,
        scales_like_model=True,
    ),
}
"""Formats of quantized checkpoints, by the `quant_method` in config.json."""
MXFP4 = "mxfp4"
"""`quant_method` of gpt-oss as it is published. Its experts are read and written in this form."""
EXTRAS = {
    **{module: each.extra for each in FORMATS.values() for module in each.loaded_with},
    "gguf": "gguf",
    **dict.fromkeys(llama_library.MODULES.values(), "gguf"),
    "onnxruntime": "onnx",
    "onnxruntime_genai": "onnx",
}
"""Extra that brings each module."""


def pip_name(module: str) -> str:
    """Returns what pip installs to bring a module: an extra of lighten, if one brings it."""
    return f"lighten[{EXTRAS[module]}]" if module in EXTRAS else module


def recognise(path: Path) -> tuple[Path, str, int | None]:
    """Returns the path that a loader opens for an artifact or a model, its format, and its vocabulary if known.

    Raises:
        RequestError: there is nothing that any loader would open.
    """
    from lighten.model.checkpoint import Checkpoint, read_config

    if path.is_file():
        if not is_gguf(path):
            raise RequestError(f"{path} is no .gguf file: give one, or the directory of a model")
        return path, "gguf", None
    if not path.is_dir():
        raise RequestError(f"{path}: no such file or directory")
    check_links(path)
    declared = read_artifact(path).format if (path / MANIFEST).is_file() else None
    vocab = read_config(path).get("vocab_size") if (path / "config.json").is_file() else None
    if declared == "onnx" or (path / "model.onnx").is_file():
        return path, "onnx", vocab or genai(path).get("vocab_size")
    if gguf := within(path):
        return gguf, "gguf", None
    checkpoint = Checkpoint(path)
    checkpoint.weight_map  # noqa: B018  refuses pickles
    return path, declared or str((checkpoint.quantization or {}).get("quant_method", "hf")), vocab
