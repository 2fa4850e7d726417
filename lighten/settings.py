"""Settings inside a step's settings, which the command line gives as text."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Strict, immutable, and read from a text such as "bits=3,group_size=64" too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bare: ClassVar[str | None] = None
    """The setting that an amount with a unit means when no name is given, as in "90MB"."""
    example: ClassVar[str] = "bits=4,group_size=64"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",")]
        if cls.bare and len(pairs) == 1 and not pairs[0][1] and re.search(r"[A-Za-z]", value):
            return {cls.bare: value}
        if not all(sign for _, sign, _ in pairs):
            raise ValueError(f"give settings such as {cls.example}")
        return {name.strip(): _number(text.strip()) for name, _, text in pairs}


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text
