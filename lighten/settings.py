"""What all settings have in common: words in any case, and settings inside settings given as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema


def spelled(model: type[BaseModel], value: Any) -> Any:
    """Returns a mapping of settings with every named choice spelled as the model spells it; other values as given."""
    if not isinstance(value, dict):
        return value
    fields = {name: model.model_fields[name].annotation for name in value if name in model.model_fields}
    return value | {name: as_spelled(value[name], list(_choices(kind))) for name, kind in fields.items()}


def as_spelled(value: Any, choices: list[Any]) -> Any:
    """Returns the choice that a text means, whatever its case; the value as given if it is none."""
    if not isinstance(value, str) or value in choices:
        return value
    return next((each for each in choices if str(each).casefold() == value.strip().casefold()), value)


def _choices(kind: Any) -> Iterator[Any]:
    """Yields the choices of the literals in an annotation."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) is not dict:
        for inner in get_args(kind):
            yield from _choices(inner)


class AnyCase(BaseModel):
    """Settings whose named choices may be written in any case: `GGUF` is gguf, `q4_k_m` is Q4_K_M."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Spells the choices before any validator looks at them, a subclass's own too."""
        return core_schema.no_info_before_validator_function(partial(spelled, cls), handler(source))


class Settings(AnyCase):
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
        return spelled(cls, {name.strip(): _number(text.strip()) for name, _, text in pairs})


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text
