"""`rtn`: the nearest codes of the full range of each group, without calibration."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from lighten.compress.quantize.methods.coded import Coded
from lighten.compress.quantize.settings import Head, Ignore, number


class Rtn(Coded):
    """Settings of `rtn`."""

    rounds: ClassVar[str] = "lighten.compress.quantize.nearest:codes"

    method: Literal["rtn"] = Field("rtn", description="how to choose the codes")
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")
    group_size: Annotated[Literal[-1, 32, 64, 128, "tensor"], BeforeValidator(number)] = Field(
        128, description="inputs that share a scale; -1 for all of them, tensor for the whole matrix"
    )
    sym: bool = Field(True, description="symmetric grid, its zero point in the middle")
    positive_scales: bool = Field(False, description="no scale below zero, for runtimes that have none")
    ignore: Ignore = ()
    head: Head = "keep"

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that are given; one that came later only if it changes something."""
        given = super().key_config()
        return {name: value for name, value in given.items() if name != "positive_scales" or value}
