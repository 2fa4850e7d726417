"""A variant of a recipe that is a model on a server, which somebody else started: `{runtime: {endpoint: URL}}`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from lighten.errors import RequestError
from lighten.evaluate.runtimes.endpoint.address import TIMEOUT, Address
from lighten.step import Context, Step
from lighten.store.artifact import Artifact
from lighten.store.files import write_json

FORM = "endpoint"
FILE = "server.json"


class Endpoint(Step):
    """Makes nothing of its source: the model is the one that the server has."""

    kind: ClassVar[str] = "runtime"
    version: ClassVar[int] = 1
    work: ClassVar[str] = "lighten.evaluate.runtimes.endpoint.step:describe"
    calibrated: ClassVar[bool] = False
    computes: ClassVar[bool] = False
    runtime: ClassVar[str] = "endpoint"

    endpoint: str = Field(description="address of the server, such as http://HOST:8000/v1")
    model: str | None = Field(None, description="name of the model on the server (default: its only one)")
    tokenizer: Path | None = Field(
        None, description="directory or .gguf file with the model's tokenizer (default: that of the recipe's model)"
    )
    timeout: float = Field(TIMEOUT, gt=0, description="seconds that the server may stay silent")

    @field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            if Address.parse(value).model or "#" in value:
                raise ValueError("give the URL alone; model, tokenizer and timeout are keys beside it")
        except RequestError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def writes(self) -> str:
        """See `Step`."""
        return FORM

    def address(self, tokenizer: Path) -> Address:
        """Returns the address, with a tokenizer to read with if the settings name none."""
        own = self.tokenizer.expanduser().absolute() if self.tokenizer else tokenizer
        return replace(Address.parse(self.endpoint), model=self.model, tokenizer=own, timeout=self.timeout)


def describe(step: Endpoint, _source: Artifact, out: Path, _context: Context) -> dict[str, Any]:
    """Writes what the server says of the model, and returns it as facts.

    Raises:
        RequestError: it has no such model any more.
        Failure: it does not answer.
    """
    from lighten.evaluate.runtimes.endpoint.abilities import find_card
    from lighten.evaluate.runtimes.endpoint.connection import Http

    address = Address.parse(step.endpoint)
    http = Http(replace(address, model=step.model, timeout=step.timeout))
    card = find_card(http)
    found = {"address": address.url, "model": card.name, "program": http.server or card.owner}
    write_json(out / FILE, found)
    http.close()
    sizes = {"params": card.params, "size_bytes": card.size, "weights": card.dtype}
    return {"format": FORM, **{name: value for name, value in {**found, **sizes}.items() if value is not None}}
