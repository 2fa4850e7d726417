"""The export step to ONNX."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lighten.export.step import Export


class Onnx(Export):
    """Writes an ONNX directory."""

    version: ClassVar[int] = 1

    format: Literal["onnx"] = Field(description="what to write")
