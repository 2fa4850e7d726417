"""The tokenizer of a server, as llama.cpp and vLLM show theirs: /tokenize and /detokenize beside OpenAI's API."""

from __future__ import annotations

from typing import Any

from lighten.errors import Failure
from lighten.evaluate.runtimes.endpoint.connection import Barred, Declined, Http

TEXT = "Hello world"
"""Text that a server is tried with."""


class ServerTokenizer:
    """See `Tokenizer`. Every call is a request, and a Failure if the server refuses it."""

    eos: int | None = None
    """Not known: no server says it."""

    def __init__(self, http: Http, model: str, text: str, adds: str) -> None:
        """Takes the names that the server has for a text and for the wish for special tokens."""
        self._http, self._model, self._text, self._adds = http, model, text, adds
        plain, whole = self._ids(TEXT, special=False), self._ids(TEXT, special=True)
        self._text_of(plain)
        self.bos: int | None = whole[0] if whole[1 : len(plain) + 1] == plain else None
        self.prefix: int | None = self.bos

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""
        try:
            return self._ids(text, special=False) if text else []
        except Declined as error:
            raise Failure(f"{self._http.address.host} does not cut a text of {len(text)} letters: {error}") from error

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Returns the text of ids, as the server writes it. Special tokens are what the server makes of them."""
        try:
            return self._text_of(ids)
        except Declined as error:
            raise Failure(f"{self._http.address.host} does not write out {len(ids)} tokens: {error}") from error

    def _text_of(self, ids: list[int]) -> str:
        body = {"model": self._model, "tokens": [int(each) for each in ids]}
        found = self._http.post(f"{self._http.address.root}/detokenize", body)
        text = found.get(self._text) if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise Declined(200, "/detokenize gives no text")
        return text

    def _ids(self, text: str, *, special: bool) -> list[int]:
        body: dict[str, Any] = {"model": self._model, self._text: text, self._adds: special}
        found = self._http.post(f"{self._http.address.root}/tokenize", body)
        ids = found.get("tokens") if isinstance(found, dict) else None
        if not (isinstance(ids, list) and all(isinstance(each, int) for each in ids) and (ids or not text)):
            raise Declined(200, "/tokenize gives no ids")
        return ids


def find_tokenizer(http: Http, model: str) -> ServerTokenizer | None:
    """Returns the tokenizer that a server shows; None if it shows none."""
    for text, adds in (("content", "add_special"), ("prompt", "add_special_tokens")):
        try:
            return ServerTokenizer(http, model, text, adds)
        except (Declined, Barred):
            continue
    return None
