"""How large an artifact may be: the setting that quantizers and exporters share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lighten.knapsack import parse_size


class Budget(BaseModel):
    """One of the two. As text "size=90MB", "90MB" or "bits=4.5"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Annotated[int, BeforeValidator(lambda size: parse_size(size) if isinstance(size, str) else size)] | None = (
        Field(None, gt=0, description="bytes of the whole artifact, or a text such as 90MB")
    )
    bits: float | None = Field(None, gt=0, le=32, description="bits per weight, on average")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if found := re.fullmatch(r"\s*(size|bits)\s*=\s*(.+)", value):
            return {found[1]: found[2]}
        if re.search(r"[A-Za-z]", value):
            return {"size": value}
        raise ValueError("say what the budget is of: size=90MB, or bits=4.5")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.size is None) == (self.bits is None):
            raise ValueError("a budget is one of the two: size, or bits")
        return self
