"""How large an artifact may be: the setting that quantizers and exporters share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from lighten.numerics.knapsack import parse_size
from lighten.settings import Settings


class Budget(Settings):
    """One of the two. As text "size=90MB", "90MB" or "bits=4.5"."""

    bare: ClassVar[str | None] = "size"
    example: ClassVar[str] = "size=90MB, or bits=4.5"

    size: Annotated[int, BeforeValidator(lambda size: parse_size(size) if isinstance(size, str) else size)] | None = (
        Field(None, gt=0, description="bytes of the whole artifact, or a text such as 90MB")
    )
    bits: float | None = Field(None, gt=0, le=32, description="bits per weight, on average")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.size is None) == (self.bits is None):
            raise ValueError("a budget is one of the two: size, or bits")
        return self
