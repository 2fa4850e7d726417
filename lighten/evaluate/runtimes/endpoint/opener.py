"""The opener of models on servers: any URL of an API like OpenAI's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

from lighten.errors import RequestError
from lighten.evaluate.runtimes.endpoint.address import Address, is_url
from lighten.evaluate.runtimes.opener import Conditions, Opener, Target
from lighten.facts import ModelFacts

if TYPE_CHECKING:
    from pathlib import Path

    from lighten.evaluate.runtimes.runtime import Runtime, Server, Tokenizer
    from lighten.evaluate.runtimes.words import Words


class EndpointOpener(Opener[str]):
    """URLs, as `Address` reads them."""

    name: ClassVar[str] = "endpoint"
    remote: ClassVar[bool] = True

    def recognises(self, target: Target) -> str | None:
        """See `Opener`."""
        return target if isinstance(target, str) and is_url(target) else None

    def facts(self, place: str) -> ModelFacts:
        """See `Opener`: what the server says."""
        from lighten.evaluate.runtimes.endpoint.abilities import find_card
        from lighten.evaluate.runtimes.endpoint.connection import Http

        return find_card(Http(Address.parse(place))).facts

    def open(self, place: str, conditions: Conditions) -> Runtime:
        """See `Opener`. The conditions are the server's own."""
        from lighten.evaluate.runtimes.endpoint.runtime import EndpointRuntime

        address = Address.parse(place)
        return EndpointRuntime(address, _of_this_side(address))

    def tokenizer(self, place: str) -> Tokenizer:
        """See `Opener`: that of this side if the address names one, else the server's.

        Raises:
            Unavailable: there is none.
        """
        from lighten.evaluate.runtimes.endpoint.abilities import find_card
        from lighten.evaluate.runtimes.endpoint.connection import Http
        from lighten.evaluate.runtimes.endpoint.runtime import no_tokenizer
        from lighten.evaluate.runtimes.endpoint.server_tokenizer import find_tokenizer
        from lighten.evaluate.runtimes.unavailable import Unavailable

        address = Address.parse(place)
        if (ours := _of_this_side(address)) is not None:
            return ours
        http = Http(address)
        if (theirs := find_tokenizer(http, find_card(http).name)) is not None:
            return theirs
        raise Unavailable(no_tokenizer(address), {"runtime": self.name, "device": "server"})

    def words(self, place: str) -> Words:
        """See `Opener`: those of the tokenizer that the address names; else the server's ids only, no chats."""
        from lighten.evaluate.runtimes.choose import words_of
        from lighten.evaluate.runtimes.words import Words

        if (path := Address.parse(place).tokenizer) is not None:
            return words_of(path)
        found = self.tokenizer(place)
        return Words(found.encode, found.bos, found.eos, {})

    def files(self, place: str) -> Path | None:
        """See `Opener`: the tokenizer that the address names."""
        return Address.parse(place).tokenizer

    def server(self, place: str, context: int, device: str) -> AbstractContextManager[Server]:
        """See `Opener`: the server itself, which somebody else started."""
        from lighten.evaluate.runtimes.endpoint.runtime import EndpointServer

        return EndpointServer(Address.parse(place))


def _of_this_side(address: Address) -> Tokenizer | None:
    from lighten.evaluate.runtimes.choose import open_tokenizer

    return open_tokenizer(address.tokenizer) if address.tokenizer else None


def served(text: str, say: Callable[[str], None]) -> tuple[Address, ModelFacts, int | None]:
    """Asks a server for the model of an address, before any work.

    Returns:
        The address with the name of its model, the sizes of the model, and the bytes of its weights, if it says so.

    Raises:
        RequestError: the address or a name is wrong, or the tokenizer of this side is not the server's.
        Failure: the server does not answer.
    """
    from lighten.evaluate.runtimes.endpoint.abilities import find_abilities, named
    from lighten.evaluate.runtimes.endpoint.connection import Http

    address = Address.parse(text)
    http = Http(address, say)
    found = find_abilities(http, _reader(address))
    http.close()
    return named(address, found.card), found.card.facts, found.card.size


def _reader(address: Address) -> Callable[[str], list[int]] | None:
    """Returns what gives the ids of a text by the tokenizer that an address names, without heavy imports."""
    if address.tokenizer is None:
        return None
    from lighten.model.gguf_header import within
    from lighten.model.tokens import load_tokenizer

    path = address.tokenizer
    if not path.exists():
        raise RequestError(f"--tokenizer {path}: no such directory or .gguf file")
    try:
        tokenizer = load_tokenizer(within(path) or path)
    except RequestError:
        if path.is_dir():
            raise
        return None  # llama.cpp knows more kinds in .gguf files; it is compared when the model is opened

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode
