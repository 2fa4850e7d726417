"""Which runtime opens a model: chosen by what lies on disk."""

from __future__ import annotations

from pathlib import Path

from lighten.errors import RequestError
from lighten.evaluate.runtimes.runtime import Runtime, Tokenizer
from lighten.evaluate.settings import Options
from lighten.model.gguf_header import is_gguf, within
from lighten.model.onnx_source import find_onnx


def open_runtime(
    path: Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    options: Options | None = None,
    arithmetic: str | None = None,
) -> Runtime:
    """Loads a model on the runtime that serves its format.

    Args:
        path: a .gguf or .onnx file, a directory that holds one, or a Hugging Face model directory.
        device: "cpu", "cuda" or "cuda:N".
        dtype: arithmetic for a Hugging Face model. None is for measuring quality: float32 (so that the noise of
            arithmetic is not taken for a loss by compression), but bfloat16 on a GPU that float32 does not fit.
        trust_remote_code: whether code that lies beside the weights may run; only if the person asked for it.
        options: how transformers is to run it; other runtimes have no such choice.
        arithmetic: what transformers measures quality in, where models that are compared shall have the same.

    Raises:
        RequestError: nothing there that can be run, or an extra is missing.
        Failure: the model is damaged, or this machine has not what the options ask for.
    """
    if onnx := find_onnx(path):
        from lighten.evaluate.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(onnx, device)
    gguf = find_gguf(path)
    if gguf:
        from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime

        return LlamaCppRuntime(gguf, device)
    from lighten.evaluate.runtimes.torch import TorchRuntime

    return TorchRuntime(path, device, dtype, trust_remote_code, options, arithmetic)


def open_tokenizer(path: Path) -> Tokenizer:
    """Opens the tokenizer of a model directory, a .gguf or an .onnx file, without the weights."""
    from lighten.evaluate.runtimes.tokenizer import HfTokenizer

    if onnx := find_onnx(path):
        return HfTokenizer(onnx.parent)
    gguf = find_gguf(path)
    if gguf:
        from lighten.evaluate.runtimes.llama_binding import GgufTokenizer

        return GgufTokenizer(gguf)
    return HfTokenizer(path)


def find_gguf(path: Path) -> Path | None:
    """Returns the .gguf file that `path` is or holds, or None for a Hugging Face model directory."""
    if is_gguf(path):
        return path
    if not path.is_dir():
        what = "is neither a .gguf file nor a model directory" if path.exists() else "does not exist"
        raise RequestError(f"cannot measure {path}: it {what}")
    found = within(path)
    if not found and not any(path.glob("*.safetensors")) and not (path / "config.json").is_file():
        raise RequestError(f"{path} holds neither a config.json nor a .gguf file: not a model")
    return found
