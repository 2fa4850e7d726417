"""The export step to a bundle for a device."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lighten.export.step import Export


class Bundle(Export):
    """Writes an directory and an archive for a device."""

    version: ClassVar[int] = 1

    format: Literal["bundle"] = Field(description="what to write")
