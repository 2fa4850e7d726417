"""`int8-dynamic`: 8-bit weights to nearest, inputs rounded as they come, without calibration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lighten.compress.quantize.methods.integers import Integers
from lighten.compress.quantize.settings import Head, Ignore


class Int8Dynamic(Integers):
    """Settings of `int8-dynamic`."""

    method: Literal["int8-dynamic"] = Field("int8-dynamic", description="how to choose the codes")
    bits: Literal[8] = Field(8, description="bits of a weight")
    ignore: Ignore = ()
    head: Head = "keep"
