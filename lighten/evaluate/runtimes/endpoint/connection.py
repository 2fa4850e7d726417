"""HTTP to one server: JSON there and back, streams, waiting where the server asks for it, and errors in words."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lighten.errors import Failure, LightenError, RequestError
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.runtimes.endpoint.events import DONE, Events

KEY, OTHER_KEY = "LIGHTEN_API_KEY", "OPENAI_API_KEY"
"""Environment variables that hold the key. The second one goes to this machine and over https only."""
CONNECT_SECONDS = 10.0
PATIENCE = 120.0
"""Seconds that one request waits at most, all waits together, while the server is too busy."""
LEAST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds of a wait at most, if the server does not say how long."""
BUSY = "waiting"
"""First word of the notes about waits."""
PIECE, LONGEST_ERROR, LONGEST = 1 << 16, 1 << 20, 1 << 28
"""Bytes of a stream that are read at once at most, of the text of an error, and of an answer."""
Answer = TypeVar("Answer")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Declined(Exception):
    """The error that a server answered a request with something else than success."""

    def __init__(self, status: int, reason: str, wait: float | None = None) -> None:
        """Takes the status, the server's words, and the seconds that it asks to wait."""
        super().__init__(reason if status == 200 else f"{status} {reason}")
        self.status, self.reason, self.wait = status, reason, wait


class Barred(RequestError):
    """The error that a server asks for a key, or sends the caller elsewhere."""


def api_key(url: str) -> str | None:
    """Returns the key for a server from the environment; None without one.

    Raises:
        RequestError: it has characters that cannot be sent.
    """
    parts = urlsplit(url)
    private = parts.scheme == "https" or parts.hostname in LOOPBACK
    name = KEY if os.environ.get(KEY) else OTHER_KEY
    key = os.environ.get(name, "").strip() if name == KEY or private else ""
    if not (key.isascii() and key.isprintable()):
        raise RequestError(f"the key in {name} has characters that no key has: set it again")
    return key or None


class Http:
    """Requests to one server. Several threads may share it: each has a connection of its own."""

    def __init__(self, address: Address, say: Callable[[str], None] | None = None) -> None:
        """Prepares requests to a server; `say` gets a line for the person whenever a request has to wait.

        Raises:
            RequestError: the key in the environment cannot be sent.
        """
        self.address = address
        self.say: Callable[[str], None] = say or (lambda text: None)
        self.server = ""
        """What the server calls itself in its headers."""
        self._key = api_key(address.url)
        self._own = threading.local()

    def get(self, url: str) -> Any:
        """Returns the JSON at a URL. Errors are those of `post`."""
        return self.patiently(lambda: self._json("GET", url, None))

    def post(self, url: str, body: dict[str, Any]) -> Any:
        """Returns the JSON that answers `body`. Waits while the server is too busy.

        Raises:
            Declined: the server answered with an error.
            Barred: the key is missing or wrong, or the address is.
            Failure: no answer, or still too busy after `PATIENCE`.
        """
        return self.patiently(lambda: self._json("POST", url, body))

    def stream(self, url: str, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yields the events that answer `body`, each with the moment (`time.perf_counter`) at which it arrived.

        It does not wait for a busy server, unless `patiently` asks. Errors are those of `post`.
        """
        connection, response = self._send("POST", url, body)
        events, finished = Events(), False
        with closing(connection), self._in_words(url):
            if response.status != 200:
                raise self._declined(response)
            if not response.getheader("Content-Type", "").startswith("text/event-stream"):
                raise Declined(response.status, "it does not stream its answer")
            more = b"."
            while more:
                more = response.read1(PIECE)
                moment = time.perf_counter()
                for data in events.feed(more) if more else events.end():
                    if data == DONE:
                        return
                    event = self._event(data)
                    finished = finished or _finishes(event)
                    yield moment, event
        if not finished:  # some servers end without a word, once they have said why they stop
            raise Declined(response.status, "it ended its stream before the end of its answer")

    def close(self) -> None:
        """Closes the connection of this thread."""
        if connection := getattr(self._own, "connection", None):
            connection.close()
            self._own.connection = None

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Returns what `ask` returns, after waiting as often as a busy server asks for it.

        Raises:
            Declined: the server answered with another error.
            Failure: it is still too busy after `PATIENCE`.
        """
        waited, tries = 0.0, 0
        while True:
            try:
                return ask()
            except Declined as error:
                wait, why = self._wait(error, waited, tries), str(error)
            self.say(f"{BUSY} {wait:.0f} s: {self.address.host} is too busy ({why})")
            time.sleep(wait)
            waited, tries = waited + wait, tries + 1

    def _wait(self, error: Declined, waited: float, tries: int) -> float:
        """Returns the seconds to wait after an answer. Raises the answer itself if it does not ask for that."""
        if error.status != 429 and not (error.status == 503 and error.wait is not None):
            raise error
        wait = min(2.0**tries, LONGEST_WAIT) if error.wait is None else max(error.wait, LEAST_WAIT)
        if waited + wait > PATIENCE:
            raise Failure(
                f"{self.address.host} is too busy ({error}): the next wait would be {wait:.0f} s, after {waited:.0f} s "
                f"of waiting, and lighten waits {PATIENCE:.0f} s at most: measure later, or raise the server's limit"
            ) from error
        return wait

    def _json(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        used = getattr(self._own, "connection", None) is not None
        try:
            _, response = self._send(method, url, body, kept=True)
        except Failure as error:
            if not (used and isinstance(error.__cause__, ConnectionError)):
                raise
            # the server has closed a connection that it kept open for a while
            _, response = self._send(method, url, body, kept=True)
        with self._in_words(url):
            if response.status != 200:
                raise self._declined(response)
            text = response.read(LONGEST)
        if not response.isclosed():
            self.close()
        if len(text) == LONGEST:
            raise Declined(response.status, f"its answer is longer than {LONGEST / 1e6:.0f} MB")
        try:
            return json.loads(text)
        except ValueError as error:
            raise Declined(response.status, f"its answer is no JSON: {self._quoted(text)}") from error

    def _send(
        self, method: str, url: str, body: dict[str, Any] | None, *, kept: bool = False
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request over the thread's own connection, or over a new one. Returns it, and the begun response."""
        headers = {"Accept": "application/json, text/event-stream", "User-Agent": "lighten"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._in_words(url):
            connection = getattr(self._own, "connection", None) if kept else None
            if connection is None:
                connection = self._connect(url)
                if kept:
                    self._own.connection = connection
            path = urlsplit(url).path or "/"
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            self.server = self.server or str(response.getheader("Server") or "")
            return connection, response

    def _connect(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        assert parts.hostname
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        timeout = self.address.timeout
        connection = kind(parts.hostname, parts.port, timeout=min(CONNECT_SECONDS, timeout))
        try:
            connection.connect()
        except TimeoutError as error:
            here = "takes the connection, and says nothing by TLS: is its address http://, not https://?"
            there = "is not reachable: check the address and the network"
            raise Failure(f"{self.address.host} {here if connection.sock else there}") from error
        connection.sock.settimeout(timeout)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _declined(self, response: http.client.HTTPResponse) -> Declined | LightenError:
        """Returns the error for an answer that is no success, in the server's words."""
        host, status = self.address.host, response.status
        said = self._quoted(response.read(LONGEST_ERROR)) or response.reason
        if not response.isclosed():
            self.close()  # what is left of it would be taken for the next answer
        if status in (401, 403):
            known = "the key in the environment is not accepted" if self._key else f"there is no key in {KEY}"
            return Barred(f"{host} asks for a key ({status}: {said}), and {known}: set {KEY} to the server's key")
        if 300 <= status < 400:
            place = self._quoted(response.getheader("Location", "").encode())
            return Barred(f"{host} has moved ({status}) to {place}: give that address, with /v1 at its end")
        return Declined(status, said, seconds_to_wait(response.getheader("Retry-After")))

    def _quoted(self, text: bytes) -> str:
        """Returns what a server said in one short line, without the key."""
        words = text.decode(errors="replace")
        try:
            found = json.loads(words)
            inner = found.get("error", found) if isinstance(found, dict) else found
            inner = inner.get("message", inner) if isinstance(inner, dict) else inner
            words = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
        except ValueError:
            pass
        words = words.replace(self._key, "(key)") if self._key else words
        return " ".join(words.split())[:300]

    def _event(self, data: str) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Declined(200, f"it streams something else than JSON objects: {self._quoted(data.encode())}")
        if found.get("error"):
            raise Declined(200, self._quoted(data.encode()))
        return found

    def _in_words(self, url: str) -> _InWords:
        return _InWords(self, url)


class _InWords:
    """Turns errors of the connection into one message, and closes the connection."""

    def __init__(self, http_: Http, url: str) -> None:
        self._http, self._url = http_, url

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, OSError | http.client.HTTPException):
            return
        self._http.close()
        raise Failure(_in_words(error, self._http.address, self._url)) from error


def _in_words(error: BaseException, address: Address, url: str) -> str:
    host = address.host
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {host} is not trusted ({error.verify_message}): name the file of the certificate that "
            "it was signed with in SSL_CERT_FILE, or check the name of the host"
        )
    if isinstance(error, ssl.SSLError):
        return f"{host} does not speak TLS as expected ({error.reason or error}): is its address http://, not https://?"
    if isinstance(error, TimeoutError):
        return (
            f"{host} did not answer {urlsplit(url).path} in time ({address.timeout:g} s): it is loading, busy, or not "
            "reachable; --timeout gives it more"
        )
    if isinstance(error, socket.gaierror):
        return f"there is no host {urlsplit(url).hostname}: check the address"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing answers at {host}: is the server running, and is the port right?"
    if isinstance(error, http.client.BadStatusLine | ConnectionResetError):
        advice = "is its address https://?" if url.startswith("http://") else "look at its log"
        return f"{host} closed the connection without an answer: {advice}"
    return f"the connection to {host} failed ({type(error).__name__}: {error}): is the server still running?"


def _finishes(event: dict[str, Any]) -> bool:
    """Returns whether an event says why the answer ends."""
    choices = event.get("choices")
    return isinstance(choices, list) and any(isinstance(each, dict) and each.get("finish_reason") for each in choices)


def seconds_to_wait(header: str | None) -> float | None:
    """Returns the seconds of a Retry-After header, which has seconds or a date (RFC 9110, section 10.2.3)."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
