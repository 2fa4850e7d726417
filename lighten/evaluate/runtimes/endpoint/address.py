"""The address of a model on a server, in one text: URL, name of the model, tokenizer, patience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from lighten.errors import RequestError

SCHEMES = ("http://", "https://")
TIMEOUT = 300.0
"""Seconds that a server may stay silent, if the person does not say."""
KEYS = ("model", "tokenizer", "timeout")
"""What may stand behind the "#" of an address."""


def is_url(text: object) -> bool:
    """Returns whether a text names a server."""
    return isinstance(text, str) and text.lower().startswith(SCHEMES)


@dataclass(frozen=True)
class Address:
    """Where a model is served, and what this side needs to know about it.

    As text it is `URL#model=NAME&tokenizer=PATH&timeout=SECONDS`. Only the URL is sent anywhere.
    """

    url: str
    """Start of every request, without a slash at its end: "http://host:8000/v1"."""
    model: str | None = None
    """Name of the model on the server; None for its only one."""
    tokenizer: Path | None = None
    """Model directory or .gguf file on this machine whose tokenizer is that of the served model."""
    timeout: float = TIMEOUT
    """Seconds that the server may stay silent."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Returns the address that a text spells. A URL without a path gets the usual one, "/v1".

        Raises:
            RequestError: it is no address, or has a password or a query, which would stand in every result.
        """
        plain, _, rest = text.partition("#")
        try:
            parts = urlsplit(plain)
            host, _port = parts.hostname, parts.port
        except ValueError as error:
            raise RequestError(f"the address of the server cannot be read: {error}") from error
        if not host or not is_url(plain):
            raise RequestError("the address of a server looks like http://HOST:PORT/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise RequestError(
                f"the address of the server {host} has a password or a query, which results would show: leave it out, "
                "and put the key into the environment variable LIGHTEN_API_KEY"
            )
        given = dict(parse_qsl(rest, strict_parsing=False))
        if unknown := set(given) - set(KEYS):
            raise RequestError(f"{plain}#{unknown.pop()}: there is {', '.join(KEYS)}")
        folder = given.get("tokenizer")
        return cls(
            plain.rstrip("/") + ("" if parts.path.strip("/") else "/v1"),
            given.get("model"),
            Path(folder).expanduser() if folder else None,
            _seconds(given.get("timeout")),
        )

    def __str__(self) -> str:
        given = {"model": self.model, "tokenizer": self.tokenizer, "timeout": f"{self.timeout:g}"}
        if self.timeout == TIMEOUT:
            given["timeout"] = None
        kept = urlencode({name: str(value) for name, value in given.items() if value}, safe="/:@")
        return f"{self.url}#{kept}" if kept else self.url

    def reading_with(self, tokenizer: Path) -> Address:
        """Returns the address with a tokenizer of this machine."""
        return replace(self, tokenizer=tokenizer.absolute())

    @property
    def root(self) -> str:
        """Start of what a server offers besides OpenAI's API: the URL without "/v1"."""
        return self.url.removesuffix("/v1")

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc

    @property
    def shown(self) -> str:
        """The address for results: without paths of this machine."""
        return str(Address(self.url, self.model))


def _seconds(text: str | None) -> float:
    try:
        found = TIMEOUT if text is None else float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise RequestError(f"timeout {text}: give the seconds that the server may stay silent, such as 60")
    return found


def addressed(
    texts: Sequence[str], models: Sequence[str], tokenizers: Sequence[str], timeout: float | None = None
) -> list[str]:
    """Returns what a person named, each URL with its model, tokenizer and timeout.

    Args:
        texts: paths and URLs. Paths stay as they are.
        models: names on the servers: one for all URLs, or one for each, in order.
        tokenizers: directories or .gguf files, as `models`.
        timeout: seconds that a server may stay silent; None for the default.

    Raises:
        RequestError: there is another number of names than of URLs, or no URL.
    """
    places = [place for place, text in enumerate(texts) if is_url(text)]
    if not places:
        flags = {"--model": models, "--tokenizer": tokenizers, "--timeout": timeout}
        if given := [name for name, value in flags.items() if value]:
            raise RequestError(f"{given[0]} is about models on servers, and no http://HOST:PORT/v1 is given")
        return list(texts)
    found = list(texts)
    names, folders = (_each(*each, len(places)) for each in (("--model", models), ("--tokenizer", tokenizers)))
    for place, name, folder in zip(places, names, folders, strict=True):
        address = Address.parse(texts[place])
        found[place] = str(
            replace(
                address,
                model=name or address.model,
                tokenizer=Path(folder).expanduser() if folder else address.tokenizer,
                timeout=address.timeout if timeout is None else _seconds(str(timeout)),
            )
        )
    return found


def _each(flag: str, values: Sequence[str], count: int) -> list[str | None]:
    if len(values) not in (0, 1, count):
        raise RequestError(f"{flag} is given {len(values)} times for {count} servers: give it once, or once for each")
    return [*values] if len(values) == count else [values[0] if values else None] * count
