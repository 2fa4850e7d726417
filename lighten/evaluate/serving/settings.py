"""A server that lighten starts: its settings, as a recipe or the command line gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lighten.errors import nearest
from lighten.evaluate.serving import SERVERS
from lighten.settings import as_spelled

START_SECONDS = 600.0
"""Seconds until a server answers, at most: it loads the model, and may compile for it."""


class Serve(BaseModel):
    """A server that is started for a variant. Only a person says what runs: these settings come from no artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    program: str = Field(alias="with")
    """Name of the server, one of `SERVERS`."""
    python: Path | None = None
    """Python of another environment that has the server's package; None for the one that runs lighten."""
    args: tuple[str, ...] = ()
    """Arguments for the server, behind those that lighten gives."""
    start: float = Field(START_SECONDS, gt=0, le=86400)
    """Seconds that it gets until it answers."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_name(cls, value: Any) -> Any:
        return {"with": value} if isinstance(value, str) else value

    @field_validator("program", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        value = as_spelled(value, SERVERS.names)
        if value not in SERVERS.names:
            near = nearest(str(value), SERVERS.names)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no such server: {hint}There is {', '.join(SERVERS.names)}")
        return value

    @field_validator("args", mode="before")
    @classmethod
    def _numbers_are_words(cls, value: Any) -> Any:
        """Takes numbers as they are written in YAML: `args: [--max-num-seqs, 4]`."""
        if not isinstance(value, list | tuple):
            return value
        return [str(each) if isinstance(each, int | float) and not isinstance(each, bool) else each for each in value]

    @model_validator(mode="after")
    def _leaves_ours(self) -> Serve:
        own = SERVERS.load(self.program).own
        if taken := next((each for each in self.args if each.partition("=")[0] in own), None):
            raise ValueError(f"args: lighten gives {taken.partition('=')[0]} itself: leave it out")
        return self

    @property
    def runs_what_it_names(self) -> bool:
        """Whether it says more than the name of a server: a program to run, or arguments, which may load code."""
        return self.python is not None or bool(self.args)
