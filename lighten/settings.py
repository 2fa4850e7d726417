"""What all settings have in common: choices in any case, and settings that are given as text inside settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

Model = TypeVar("Model", bound=BaseModel)


def spelled(model: type[BaseModel], value: Any) -> Any:
    """Returns settings in which every named choice is spelled as the model spells it. Other values stay."""
    if not isinstance(value, dict):
        return value
    fields = {name: model.model_fields[name].annotation for name in value if name in model.model_fields}
    return value | {name: as_spelled(value[name], list(_choices(annotation))) for name, annotation in fields.items()}


def as_spelled(value: Any, choices: list[Any]) -> Any:
    """Returns the choice that a text means, in any case; the value itself if it is no choice."""
    if not isinstance(value, str) or value in choices:
        return value
    return next((each for each in choices if str(each).casefold() == value.strip().casefold()), value)


def rebuilt(model: type[Model], dumped: Mapping[str, Any]) -> Model:
    """Returns the settings that `model_dump(mode="json")` was called on, without another check.

    For what this program has checked and written itself, and for nothing else.
    """
    fields = model.model_fields
    return model.model_construct(**{name: _rebuilt(fields[name].annotation, value) for name, value in dumped.items()})


def _rebuilt(annotation: Any, value: Any) -> Any:
    """Returns a value of an annotation from what JSON has in its place."""
    arms = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) in (Annotated, Union, UnionType):
        fitting = (each for each in arms if isinstance(value, _json_type(each)))
        return value if value is None else _rebuilt(next(fitting, None), value)
    if isinstance(value, list):
        inner = arms[0] if arms else None
        return (tuple if get_origin(annotation) is tuple else list)(_rebuilt(inner, each) for each in value)
    if isinstance(value, dict) and get_origin(annotation) is dict:
        return {key: _rebuilt(arms[1], each) for key, each in value.items()}
    if isinstance(annotation, type) and isinstance(value, dict) and issubclass(annotation, BaseModel):
        return rebuilt(annotation, value)
    return Path(value) if annotation is Path else value


def _json_type(annotation: Any) -> type | tuple[type, ...]:
    """Returns what JSON has in the place of a value of an annotation."""
    if get_origin(annotation) in (tuple, list):
        return list
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return dict
    return (str, int, float, bool)


def _choices(annotation: Any) -> Iterator[Any]:
    """Yields the choices of the literals in an annotation."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is not dict:
        for inner in get_args(annotation):
            yield from _choices(inner)


class AnyCase(BaseModel):
    """Settings whose named choices may be written in any case: `GGUF` is gguf, `q4_k_m` is Q4_K_M."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Spells the choices before any validator sees them, including those of a subclass."""
        return core_schema.no_info_before_validator_function(partial(spelled, cls), handler(source))


class Settings(AnyCase):
    """Strict, immutable settings. They can also be read from a text such as "bits=3,group_size=64"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bare: ClassVar[str | None] = None
    """Name of the setting that an amount with a unit means if no name is given, as in "90MB"."""
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


_SCALES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Returns the bytes that a text such as "90MB", "1.5 GiB" or "90000000" means.

    Raises:
        ValueError: the text is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _SCALES:
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with kB, MB, GB, KiB, MiB or GiB: 90MB")
    return math.floor(float(found[1]) * _SCALES[found[2].upper()] + 1e-6)


class Budget(Settings):
    """A budget: one of the two settings. As text it is "size=90MB", "90MB" or "bits=4.5"."""

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
