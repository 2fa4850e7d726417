"""What runs a model: each runtime has a file here with its opener, and one row."""

from __future__ import annotations

from lighten.plugins import Table

FALLBACK = "torch"
"""Name of the runtime that is asked last. It takes any directory, and says what is wrong with other paths."""
RUNTIMES = Table(
    "runtime",
    "lighten.runtimes",
    {
        "onnxruntime": f"{__name__}.onnx:OnnxOpener",
        "openvino": f"{__name__}.openvino:OpenVinoOpener",
        "llama.cpp": f"{__name__}.llama_cpp:LlamaCppOpener",
        "mlx": f"{__name__}.mlx:MlxOpener",
        "ctranslate2": f"{__name__}.ctranslate2:CTranslate2Opener",
        "executorch": f"{__name__}.executorch:ExecuTorchOpener",
        "endpoint": f"{__name__}.endpoint.opener:EndpointOpener",
        FALLBACK: f"{__name__}.torch_opener:TorchOpener",
    },
    base=f"{__name__}.opener:Opener",
    key="name",
)
"""Opener of each runtime, "module:Class". Installed packages add theirs by the group `lighten.runtimes`."""
