"""A model on a server, as a runtime; and the same server under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import numpy as np

from lighten.errors import Failure, LightenError
from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.endpoint.abilities import IDS, PROBE, WORDS, Abilities, find_abilities
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.runtimes.endpoint.connection import Declined, Http
from lighten.evaluate.runtimes.endpoint.scoring import Scorer, find_scorer, first
from lighten.evaluate.runtimes.endpoint.writing import Writer
from lighten.evaluate.runtimes.runtime import Capability, Decoding, Ids, Question, Score, Timings, Tokenizer
from lighten.evaluate.runtimes.unavailable import Unavailable
from lighten.evaluate.runtimes.wanted import SEED, Wanted
from lighten.evaluate.speed.server import Refused
from lighten.step import Report

NAME = "endpoint"
ANY, LEAST = 2**31, 256
"""Size of a vocabulary that is not known: larger than any, and smaller than any."""
STOPS = 4
"""Maximum number of texts that end an answer in a request, as OpenAI has it. The others are cut off here."""
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
THREE = 3
"""Tokens of the text that scoring is tried on."""


class EndpointRuntime(Defaults):
    """A model on a server. See `Runtime` for the methods.

    Log-probabilities come from the server's own arithmetic, which it does not tell. Times include the network.
    """

    name = NAME
    device = "server"
    elsewhere = True

    def __init__(self, address: Address, tokenizer: Tokenizer | None) -> None:
        """Asks the server what it can do.

        Args:
            address: URL and name of the model.
            tokenizer: tokenizer of this side; None if the address names none.

        Raises:
            RequestError: there is no such model, or the tokenizer is not that of the server.
            Failure: the server does not answer.
        """
        self._http = Http(address)
        self._abilities = found = find_abilities(self._http, tokenizer.encode if tokenizer else None)
        self._tokenizer: Tokenizer | None = found.tokenizer or tokenizer
        self.context: int | None = found.card.context
        self.vocab = found.card.vocab or ANY
        self.dtype = found.card.dtype or "not told"
        seen = self._tokenizer.encode(PROBE) if self._tokenizer and not found.card.vocab else []
        self._known = found.card.vocab or max([*seen, LEAST - 1]) + 1
        self._scorer, said = self._find_scorer()
        if self.context and self._scorer:
            self.context -= self._scorer.writes
        self.parallel = self._scorer.parallel if self._scorer else 1
        self._turn = 0
        self.capabilities: frozenset[Capability] = frozenset(
            {*({"scores"} if self._scorer else ()), *({"decodes"} if found.writer and found.takes_ids else ())}
        )
        self.lacks: Mapping[str, str] = _lacks(found, said)
        self.detail = _detail(address, found, self._scorer, self._http.server)

    def _find_scorer(self) -> tuple[Scorer | None, str]:
        found = self._abilities
        if not found.takes_ids:
            return None, "it takes no token ids as a prompt"
        ids = list(dict.fromkeys(self._tokenizer.encode(WORDS) if self._tokenizer else IDS))[:THREE]
        return find_scorer(self._http, found.card.name, ids, found.card.slots)

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """See `Runtime`. Several questions are asked at the same time; waits for a busy server are reported."""
        start, computed = time.monotonic(), 0

        def speed(question: Question) -> str:
            nonlocal computed
            computed += question.packed
            return f"{computed / (time.monotonic() - start):.0f} tok/s"

        return self._ask(self._scored, questions, speed, report)

    def answer_many(self, asked: Sequence[Wanted], report: Report) -> list[str]:
        """See `Runtime`. Several texts are asked for at the same time; what is drawn at random is up to the server.

        Raises:
            Failure: the server takes no ids, or does not write.
        """
        if not self._abilities.takes_ids:
            raise Failure(f"{self._http.address.host} takes no token ids as a prompt: leave out tasks that are written")
        return self._ask(self._written, list(enumerate(asked)), lambda _: "", report)

    def _written(self, numbered: tuple[int, Wanted]) -> str:
        number, wanted = numbered
        body: dict[str, Any] = {"model": self._abilities.card.name, "prompt": wanted.prompt, "max_tokens": wanted.most}
        body |= {"temperature": wanted.sampling.temperature, "stop": [stop for stop in wanted.stops if stop][:STOPS]}
        if wanted.sampling.temperature > 0:
            body |= {"top_p": wanted.sampling.top_p, "seed": SEED + number}
            body |= {"top_k": wanted.sampling.top_k} if wanted.sampling.top_k else {}
        try:
            return str(first(self._http.post(f"{self._http.address.url}/completions", body)).get("text") or "")
        except Declined as error:
            raise Failure(f"{self._http.address.host} does not write {wanted.most} tokens: {error}") from error

    def _ask(
        self, ask: Callable[[Asked], Answer], asked: Sequence[Asked], note: Callable[[Asked], str], report: Report
    ) -> list[Answer]:
        """Returns the answers to many requests, several at the same time. `note` gives the words behind each."""
        answers: list[Answer] = []
        lock = threading.Lock()

        def say(text: str) -> None:
            with lock:
                report(len(answers), len(asked), text)

        report(0, len(asked), "")
        self._http.say = say
        pool = ThreadPoolExecutor(self.parallel)
        try:
            for each, found in zip(asked, pool.map(ask, asked), strict=True):
                answers.append(found)
                say(note(each))
        finally:
            pool.shutdown(cancel_futures=True)
            self._http.say = lambda text: None
        return answers

    def _scored(self, question: Question) -> list[Score]:
        assert self._scorer
        try:
            return self._scorer(question)
        except Declined as error:
            raise Failure(
                f"{self._http.address.host} does not score a text of {question.packed} tokens: {error}"
            ) from error

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """See `Runtime`. Every prompt begins with another token than before, so that no server knows its start."""
        writer = self._abilities.writer
        assert writer
        batch = len(prompt)
        fresh = prompt % self._known
        fresh[:, 0] = (fresh[:, 0] + 1 + self._turn) % self._known
        self._turn += batch
        gate = threading.Barrier(batch + 1)

        def one(ids: list[int]) -> list[float]:
            gate.wait()
            return _answer(writer, ids, steps)

        with ThreadPoolExecutor(batch) as pool:
            waiting = [pool.submit(one, [int(each) for each in ids]) for ids in fresh]
            gate.wait()
            start = time.perf_counter()
            moments = np.array([shared(each.result()[:steps]) for each in waiting])
        passed = np.diff(np.concatenate([[start], moments.max(axis=0)]))
        return Timings(float(passed[0]), [float(each) for each in passed[1:]])

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """See `Runtime`: not possible."""
        raise Failure("a server does not give the logits of what it writes")

    def encode(self, text: str) -> list[int]:
        """See `Runtime`: by the server's tokenizer if it shows it, else by the one of this side, which agrees."""
        if self._tokenizer is None:
            raise self.without_tokenizer()
        return self._tokenizer.encode(text)

    def without_tokenizer(self) -> Unavailable:
        """Returns the error for what needs a tokenizer, if there is none."""
        return Unavailable(no_tokenizer(self._http.address), {"runtime": self.name, "device": self.device})

    def close(self) -> None:
        """See `Runtime`: closes the connection."""
        self._http.close()


class EndpointServer:
    """The same server under load. See `Server`. It was started by somebody else, and runs on."""

    device = EndpointRuntime.device

    def __init__(self, address: Address) -> None:
        """Prepares requests; nothing is sent before the block begins."""
        self._address = address
        self.name = address.host
        self._writer: Writer | None = None

    def __enter__(self) -> Self:
        """Asks the server what it can do.

        Raises:
            Unavailable: it does not stream.
            RequestError, Failure: see `find_abilities`.
        """
        http = Http(self._address)
        found = find_abilities(http)
        if found.writer is None:
            raise Unavailable(f"{NAME} {_lacks(found, '')['decodes']}", {"runtime": NAME, "device": self.device})
        self._writer = found.writer
        self.name = f"{http.server or found.card.owner or 'server'} at {self._address.host}, by /{found.writer.route}"
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the server as it is."""

    def check(self, when: str) -> None:
        """Raises Failure if the server answers no more."""
        assert self._writer
        try:
            self._writer.http.get(f"{self._address.url}/models")
        except (Failure, Declined) as error:
            raise Failure(f"{self.name} answers no more {when}: {error}") from error

    def stream(self, prompt: str, steps: int, banned: list[int]) -> list[float]:
        """See `Server`.

        Raises:
            Refused: the server did not answer to the end.
        """
        assert self._writer
        try:
            return self._writer.write(prompt, steps, banned).moments
        except Declined as error:
            raise Refused(str(error)) from error
        except LightenError as error:
            raise Refused(str(error)) from error


def _answer(writer: Writer, ids: list[int], steps: int) -> list[float]:
    """Returns the moments of exactly `steps` tokens.

    Raises:
        Failure: the server wrote fewer, or refused.
    """
    try:
        moments = writer.write(ids, steps).moments
    except Declined as error:
        raise Failure(f"{writer.http.address.host} does not write {steps} tokens: {error}") from error
    if len(moments) < steps:
        raise Failure(
            f"{writer.http.address.host} wrote {len(moments)} of {steps} tokens: it stops at the end of a text, or "
            "does not count what it sends; ask for fewer tokens (--skip speed), or measure it under load"
        )
    return moments


def shared(moments: list[float]) -> list[float]:
    """Returns moments in which tokens that came in one piece share the time since the piece before it."""
    pieces = list(dict.fromkeys(moments))
    if len(pieces) == 1 < len(moments):
        raise Failure(f"the server sent all {len(moments)} tokens in one piece: its speed cannot be seen")
    ends = np.cumsum([moments.count(piece) for piece in pieces])
    spread = np.interp(np.arange(ends[0], len(moments) + 1), ends, pieces)
    return [pieces[0]] * int(ends[0] - 1) + [float(each) for each in spread]


def no_tokenizer(address: Address) -> str:
    """Returns why something cannot be measured without a tokenizer, and what to do."""
    return f"{NAME} has no tokenizer: {address.host} shows none (/tokenize), name its model's with --tokenizer"


def _lacks(found: Abilities, said: str) -> dict[str, str]:
    """Returns why the server cannot do something, for each capability."""
    why = f" ({found.refusal})" if found.refusal else ""
    ids = "" if found.takes_ids else "takes no token ids as a prompt, so its speed is known under load only"
    scores = f"does not give the log-probabilities of a prompt ({said})"
    return {
        "scores": scores,
        "logits": scores,
        "decodes": ids if found.writer else f"does not stream what the model writes{why}",
    }


def _detail(address: Address, found: Abilities, scorer: Scorer | None, server: str) -> str:
    scores = f"scores by {scorer.title}" if scorer else ""
    tokens = "" if found.compared else "tokens not compared with the server's"
    parts = [address.url, f"model {found.card.name}", server, scores, tokens]
    return ", ".join(filter(None, parts))
