"""The export formats: where the settings of each are. They say how its files are recognised, opened and served."""

from __future__ import annotations

from lighten.plugins import Table

EXPORTS = Table(
    "export format",
    "lighten.formats",
    {
        "gguf": "lighten.export.gguf.settings:Gguf",
        "onnx": "lighten.export.onnx.settings:Onnx",
        "bundle": "lighten.export.bundle.settings:Bundle",
    },
)
