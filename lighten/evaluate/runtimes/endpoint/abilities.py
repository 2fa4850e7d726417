"""What a server can do, found by asking it. No answer depends on the name of the program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lighten.errors import RequestError, nearest
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.runtimes.endpoint.connection import Barred, Declined, Http
from lighten.evaluate.runtimes.endpoint.scoring import first
from lighten.evaluate.runtimes.endpoint.server_tokenizer import ServerTokenizer, find_tokenizer
from lighten.evaluate.runtimes.endpoint.writing import Writer, find_writer
from lighten.facts import ModelFacts

PROBE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?\n\n"
    "    for i in range(10):\n\tprint(i / 3.14)  # naïve café\n"
    "Größe, señor, Москва, Ελλάδα, 日本語, مرحبا, हिन्दी — “quotes”…"
)
"""Text on which tokenizers are compared."""
WORDS = "The capital of France"
"""Short text that a server is tried with."""
IDS = [10, 11, 12]
"""Ids that a server is tried with if no tokenizer is known."""
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Card:
    """What a server says about a model, each None if it does not say."""

    name: str
    context: int | None = None
    """Number of positions of a text."""
    vocab: int | None = None
    params: int | None = None
    size: int | None = None
    """Bytes of its weights."""
    slots: int | None = None
    """Number of texts that the server keeps."""
    dtype: str | None = None
    """Type of its weights."""
    owner: str | None = None

    @property
    def facts(self) -> ModelFacts:
        """The sizes of the model. Those that a server never says are 0."""
        return ModelFacts(
            architecture="a model on a server",
            layers=0,
            hidden=0,
            intermediate=0,
            heads=0,
            kv_heads=0,
            head_dim=0,
            vocab=self.vocab or 0,
            tied=False,
            counted=self.params or 0,
            context=self.context,
        )


def find_card(http: Http) -> Card:
    """Returns what the server says about the model of an address, or about its only one.

    Raises:
        RequestError: there is no OpenAI API at the address, no such model, or several and none is named.
        Failure: the server does not answer.
    """
    address = http.address
    try:
        listed = http.get(f"{address.url}/models")
        entries = {str(each["id"]): each for each in listed["data"]}
    except Declined as error:
        advice = "" if address.url.endswith("/v1") else f": is it {address.url}/v1?"
        raise RequestError(f"there is no OpenAI API at {address.url} (/models: {error}){advice}") from error
    except (LookupError, TypeError) as error:
        raise RequestError(
            f"{address.url}/models lists no models as OpenAI's API does: is it a server of models?"
        ) from error
    names = ", ".join(entries) or "none"
    if address.model is None:
        if len(entries) != 1:
            count = "several models" if entries else "no model"
            raise RequestError(f"{address.host} serves {count}: name one with --model; there is {names}")
        return _card(http, *next(iter(entries.items())))
    if address.model not in entries:
        near = nearest(address.model, entries)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RequestError(f"{address.host} serves no model {address.model}: {hint}--model is one of {names}")
    return _card(http, address.model, entries[address.model])


def _card(http: Http, name: str, entry: dict[str, Any]) -> Card:
    given = entry.get("meta") or {}
    sizes = [_whole(given.get(key)) for key in ("n_ctx_train", "n_vocab", "n_params", "size")]
    trained, vocab, params, size = sizes
    try:
        props = http.get(f"{http.address.root}/props")
    except (Declined, Barred):
        props = {}
    props = props if isinstance(props, dict) else {}
    room = _whole((props.get("default_generation_settings") or {}).get("n_ctx"))
    contexts = [each for each in (trained, room, _whole(entry.get("max_model_len"))) if each]
    dtype, owner = (str(each) if each else None for each in (given.get("ftype"), entry.get("owned_by")))
    return Card(name, min(contexts, default=None), vocab, params, size, _whole(props.get("total_slots")), dtype, owner)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@dataclass(frozen=True)
class Abilities:
    """What a server can do with a model."""

    card: Card
    tokenizer: ServerTokenizer | None
    writer: Writer | None
    """Streams what the model writes; None if the server does not."""
    takes_ids: bool
    """Whether a prompt may be ids."""
    refusal: str
    """What the server said when it was asked to write; empty if it writes."""
    compared: bool
    """Whether its tokenizer was compared with that of this side, or is the one that is used."""


def find_abilities(http: Http, encode: Encode | None = None) -> Abilities:
    """Asks a server what it can do, and compares its tokenizer with that of this side.

    Args:
        http: the server.
        encode: gives the ids of a text by the tokenizer of this side; None without one.

    Raises:
        RequestError: see `find_card`; or the two tokenizers disagree.
        Failure: the server does not answer.
    """
    card = find_card(http)
    tokenizer = find_tokenizer(http, card.name)
    known = encode or (tokenizer.encode if tokenizer else None)
    ids = known(WORDS) if known else IDS
    writer, takes_ids, refusal = find_writer(http, card.name, ids, WORDS)
    compared = agree(http, card.name, encode, tokenizer, writer) if encode else tokenizer is not None
    return Abilities(card, tokenizer, writer, takes_ids, refusal, compared)


def agree(http: Http, model: str, encode: Encode, tokenizer: ServerTokenizer | None, writer: Writer | None) -> bool:
    """Compares the tokenizer of this side with the server's: id by id if the server shows ids, else by numbers.

    Returns:
        Whether they could be compared.

    Raises:
        RequestError: they disagree.
    """
    if tokenizer is None:
        return _agree_in_number(http, model, encode, writer)
    ours, theirs = encode(PROBE), tokenizer.encode(PROBE)
    if ours != theirs:
        at = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        where = f"the first that differs is token {at + 1}" if at is not None else "one begins as the other"
        raise _disagree(http.address, len(ours), len(theirs), where)
    return True


def _agree_in_number(http: Http, model: str, encode: Encode, writer: Writer | None) -> bool:
    """Compares by the number of tokens of each part of the text: two tokenizers seldom agree in all of them."""
    allowed = {0, 1}  # one more if BOS comes first
    for text in (PROBE, *filter(None, PROBE.splitlines())):
        ours, counted = len(encode(text)), _counted(http, model, writer, text)
        if counted is None:
            return False
        allowed &= {counted - ours}
        if not allowed:
            raise _disagree(http.address, ours, counted, "it shows only their number")
    return True


def _counted(http: Http, model: str, writer: Writer | None, text: str) -> int | None:
    """Returns how many tokens the server makes of a text, by what it says of an answer; None if it never does."""
    if writer and writer.route == "completions":
        with contextlib.suppress(Declined):
            if (count := http.patiently(partial(writer.write, text, 2)).prompt) is not None:
                return count
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0}
    for more in ({}, {"echo": True, "logprobs": 1}):
        with contextlib.suppress(Declined):
            answer = http.post(f"{http.address.url}/completions", {**body, **more})
            values = (first(answer).get("logprobs") or {}).get("token_logprobs") or []
            count = (answer.get("usage") or {}).get("prompt_tokens") or (len(values) - 1 if more and values else None)
            if count is not None:
                return int(count)
    return None


def _disagree(address: Address, ours: int, theirs: int, where: str) -> RequestError:
    return RequestError(
        f"the tokenizer {address.tokenizer} is not that of {address.model or 'the model'} on {address.host}: it makes "
        f"{ours} tokens of a text of which the server makes {theirs} ({where}); name the tokenizer of the served model "
        "with --tokenizer"
    )


def named(address: Address, card: Card) -> Address:
    """Returns an address with the name of its model."""
    return replace(address, model=card.name)
