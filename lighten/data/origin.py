"""The origin of a text: a name, a file or data set with its field and split, or several of them with shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lighten.settings import Settings


class Origin(Settings):
    """A file (`path`), or a name (`id`): builtin, or a hub data set with `config` and `split`.

    `field` is the field to read, if there are several or none that is known. `share` is the share of all sequences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    example: ClassVar[str] = "path=notes.jsonl,field=body,share=0.3"

    path: str | None = None
    id: str | None = None
    config: str | None = None
    split: str | None = None
    field: str | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.id is None):
            raise ValueError("data needs one of the two: path (a file) or id (builtin, or a hub data set)")
        if self.path is not None and (self.config or self.split):
            raise ValueError("config and split belong to a hub data set: leave them out beside path")
        return self

    @property
    def name(self) -> str:
        """Name that a person would give it."""
        hub = ":".join([self.config or "", self.split or ""]).rstrip(":")
        name = self.path or f"{self.id}{':' if hub else ''}{hub}"
        return f"{name} ({self.field})" if self.field else name


def _one(value: Any) -> Any:
    """Returns a single origin. A plain name stays a text."""
    if isinstance(value, Origin) or (isinstance(value, str) and not value.startswith(("path=", "id="))):
        return value
    if not isinstance(value, str | dict):
        raise ValueError(f"data is a name, or a mapping such as {{path: notes.jsonl, share: 0.3}}, not {value!r}")
    try:
        return Origin.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = f"; known are {', '.join(Origin.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ValueError(
            f"data{'.' if where else ''}{where}: {first['msg'].removeprefix('Value error, ')}{known}"
        ) from error


def _one_or_many(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return _one(value)
    if not value:
        raise ValueError("data names nothing")
    if len(value) == 1:
        return _one(value[0])
    return with_shares([each if isinstance(each, Origin) else _named(_one(each)) for each in value])


def _named(value: str | Origin) -> Origin:
    if isinstance(value, Origin):
        return value
    return Origin.model_validate({"path" if value != "builtin" and is_file(value) else "id": value})


def with_shares(origins: Sequence[Origin]) -> tuple[Origin, ...]:
    """Returns the origins with a share each. Origins without a share divide what is left evenly.

    Raises:
        ValueError: the shares are more or less than the whole.
    """
    given = sum(each.share or 0 for each in origins)
    open_ = [each for each in origins if each.share is None]
    if open_ and given >= 1:
        raise ValueError(f"the shares of data leave nothing for {open_[0].name}: they are {given:g} already")
    if not open_ and abs(given - 1) > 1e-6:
        raise ValueError(f"the shares of data add up to {given:g}, not to 1")
    return tuple(
        each if each.share is not None else each.model_copy(update={"share": (1 - given) / len(open_)})
        for each in origins
    )


Text = Annotated[str | Origin, BeforeValidator(_one)]
"""One text: a name, or a mapping."""
Data = Annotated[str | Origin | tuple[Origin, ...], BeforeValidator(_one_or_many)]
"""One text or a mixture of several."""

SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def is_file(name: str) -> bool:
    """Returns whether a name means a file on this machine (which may not exist) and not a data set."""
    if name.startswith("pairs:"):
        return False
    path = Path(name).expanduser()
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return True
    return name.startswith((".", "/", "~")) and not path.is_dir()  # datasets opens directories


def parts(data: str | Origin | Sequence[Origin]) -> list[Origin]:
    """Returns the origins of a text. A single origin has the share 1."""
    if isinstance(data, Origin | str):
        return [_named(data).model_copy(update={"share": 1.0})]
    return list(data)


def text_name(data: str | Origin | Sequence[Origin]) -> str:
    """Returns the name of a text in words. For a mixture these are the parts with their shares."""
    if isinstance(data, str):
        return data
    if isinstance(data, Origin):
        return data.name
    return ", ".join(f"{each.share:.0%} {each.name}" for each in data)
