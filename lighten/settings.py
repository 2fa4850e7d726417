"""What all settings have in common: choices in any case, and settings that are given as text inside settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, RootModel, model_validator
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

    Raises:
        TypeError: JSON does not tell what a setting was, such as a date, a set, or one of two models.
    """
    if issubclass(model, RootModel) or model.model_config.get("extra") == "allow":
        raise TypeError(f"{model.__name__} holds more than its fields, which JSON does not tell apart")
    if strange := dumped.keys() - model.model_fields.keys():
        raise TypeError(f"{model.__name__} has no setting {min(strange)}")
    found = {}
    for name, value in dumped.items():
        try:
            found[name] = _read(_readers(model.model_fields[name].annotation), value)
        except TypeError as error:
            raise TypeError(f"{model.__name__}.{name}: {error}") from error
    return model.model_construct(**found)


Readers = dict[type, Callable[[Any], Any]]
"""What makes a value from JSON, by the type that JSON has in its place."""


def _read(readers: Readers, value: Any) -> Any:
    """Returns the value that JSON stands for."""
    if type(value) not in readers:
        raise TypeError(f"{value!r} is no value of it")
    return readers[type(value)](value)


def _same(value: Any) -> Any:
    return value


def _readers(annotation: Any) -> Readers:
    """Returns what makes a value of an annotation from JSON.

    Raises:
        TypeError: JSON does not tell what the value was.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (None, NoneType, str, bool, int, float):
        return dict.fromkeys((int, float) if annotation is float else (annotation or NoneType,), _same)
    if annotation is Path:
        return {str: Path}
    if origin is Annotated:
        return _readers(arguments[0])
    if origin is Literal and all(type(each) in (str, bool, int, NoneType) for each in arguments):
        return {type(each): _same for each in arguments}
    if origin in (Union, UnionType):
        found: Readers = {}
        for kind, reader in (pair for each in arguments for pair in _readers(each).items()):
            if found.setdefault(kind, reader) is not reader:
                raise TypeError(f"JSON does not tell which of {annotation} it was")
        return found
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        inner = _readers(arguments[0])
        return {list: lambda values: origin(_read(inner, each) for each in values)}
    if origin is tuple:
        each_inner = [_readers(each) for each in arguments]
        return {list: lambda values: tuple(map(_read, each_inner, values))}
    if origin is dict and arguments[0] is str:
        inner = _readers(arguments[1])
        return {dict: lambda values: {name: _read(inner, each) for name, each in values.items()}}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {dict: partial(rebuilt, annotation)}
    raise TypeError(f"JSON does not tell what a value of {annotation} was")


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
