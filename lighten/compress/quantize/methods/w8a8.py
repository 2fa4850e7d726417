"""`w8a8`: 8-bit weights and inputs, outliers of the inputs moved into the weights before (SmoothQuant)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lighten.compress.quantize.methods.integers import Integers
from lighten.compress.quantize.settings import Head, Ignore


class W8a8(Integers):
    """Settings of `w8a8`."""

    scales: ClassVar[str] = "lighten.compress.quantize.smooth:scale"
    swept: ClassVar[bool] = True

    method: Literal["w8a8"] = Field("w8a8", description="how to choose the codes")
    bits: Literal[8] = Field(8, description="bits of a weight")
    ignore: Ignore = ()
    head: Head = "keep"
    alpha: float = Field(
        0.5, ge=0, le=1, description="w8a8: how far outliers move from activations into weights (default: 0.5)"
    )
