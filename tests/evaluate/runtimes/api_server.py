"""A server that speaks OpenAI's API, with a real model behind it, and whatever manners a test gives it."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from lighten.evaluate.runtimes.runtime import Runtime, Tokenizer
from tests.evaluate.conftest import log_softmax

SCORING = {"echo", "prompt_logprobs"}


@dataclass
class Manners:
    """What the server does: its forms of log-probabilities, and its errors."""

    names: list[str] = field(default_factory=lambda: ["tiny"])
    forms: set[str] = field(default_factory=set)
    takes_ids: bool = True
    streams: bool = True
    tokenizes: bool = False
    chats: bool = False
    """Whether it knows conversations only."""
    guarded: bool = False
    """Whether everything but OpenAI's paths is forbidden."""
    key: str | None = None
    busy: int = 0
    """Number of completions that are answered by 429."""
    retry_after: str = "0"
    delay: float = 0.0
    """Seconds before a completion is answered."""
    every: int = 0
    """Every so manieth stream ends with an error."""
    extra: int = 0
    """Tokens that the server counts besides those that it was sent."""
    unknown: set[str] = field(default_factory=set)
    """Names in a request that are refused."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    streamed: int = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    manners: Manners
    model: Runtime | None
    tokenizer: Tokenizer | None
    lock: threading.Lock

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        if self._welcome():
            listed = [{"id": name, "object": "model", "max_model_len": 512} for name in self.manners.names]
            found = {"/v1/models": {"object": "list", "data": listed}}.get(self.path)
            self._answer(200 if found else 404, found or {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.manners.asked.append(body)
        if not self._welcome():
            return
        known: dict[str, Callable[[dict[str, Any]], None]] = {"/v1/completions": self._complete}
        if self.manners.chats:
            known = {"/v1/chat/completions": self._complete}
        if self.manners.forms & {"biased", "moved"}:
            known["/completion"] = self._biased
        if self.manners.tokenizes:
            known |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        known.get(self.path, lambda _: self._refuse(404, f"no {self.path}"))(body)

    def _welcome(self) -> bool:
        self.manners.headers.append(dict(self.headers))
        if self.manners.key and self.headers.get("Authorization") != f"Bearer {self.manners.key}":
            self._refuse(401, f"wrong key {self.headers.get('Authorization', 'none').removeprefix('Bearer ')}")
            return False
        if self.manners.guarded and not self.path.startswith("/v1/"):
            self._refuse(403, "forbidden")
            return False
        return True

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"message": message}}, {"Retry-After": self.manners.retry_after})

    def _tokenize(self, body: dict[str, Any]) -> None:
        if "prompt" not in body or not self.tokenizer:
            self._refuse(400, "prompt is missing")
        else:
            self._answer(200, {"tokens": self.tokenizer.encode(body["prompt"])})

    def _detokenize(self, body: dict[str, Any]) -> None:
        assert self.tokenizer
        self._answer(200, {"prompt": self.tokenizer.decode(body["tokens"], special=True)})

    def _biased(self, body: dict[str, Any]) -> None:
        """Answers as llama.cpp does, but tells log-probabilities after the bias, or others each time."""
        (token, _), *_ = body["logit_bias"]
        tops = [{"id": token, "logprob": 0.0}, {"id": 1, "logprob": -50.0}]
        if "moved" in self.manners.forms:
            tops = [{"id": 1, "logprob": -2.0 - token / 1000}, {"id": token, "logprob": -3.0}]
        place = {"id": token, "logprob": next(each["logprob"] for each in tops if each["id"] == token)}
        place["top_logprobs"] = tops
        self._answer(200, {"tokens_evaluated": len(body["prompt"]), "completion_probabilities": [place]})

    def _complete(self, body: dict[str, Any]) -> None:
        manners = self.manners
        if manners.chats:
            body["prompt"] = body["messages"][0]["content"]
        time.sleep(manners.delay)
        if manners.busy > 0:
            manners.busy -= 1
            return self._refuse(429, "too many requests")
        if wrong := manners.unknown & set(body):
            return self._refuse(400, f"unknown field {wrong.pop()}")
        if isinstance(body["prompt"], list) and not manners.takes_ids:
            return self._refuse(400, "prompt must be a string")
        if body.get("stream") and manners.streams:
            return self._stream(body)
        choice: dict[str, Any] = {"text": "x", "index": 0, "finish_reason": "length"}
        if isinstance(body["prompt"], list) and self.model and manners.forms & set(body):
            choice |= self._scored(body)
        return self._answer(200, {"choices": [choice], "usage": self._usage(body, 1)})

    def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the log-probabilities of the prompt, in the form that is asked for."""
        assert self.model
        ids = body["prompt"]
        with self.lock:
            table = log_softmax(self.model.logits(np.array(ids)))
        own = [None, *(float(table[at - 1, ids[at]]) for at in range(1, len(ids)))]
        best = [None, *(int(table[at - 1].argmax()) for at in range(1, len(ids)))]
        tops = [None, *(float(table[at - 1].max()) for at in range(1, len(ids)))]
        more = self.manners.extra
        if "prompt_logprobs" in body and "prompt_logprobs" in self.manners.forms:
            rows = [
                None if own[at] is None else {str(best[at]): {"logprob": tops[at]}, str(ids[at]): {"logprob": own[at]}}
                for at in range(len(ids))
            ]
            return {"prompt_logprobs": rows + rows[-1:] * more}
        if not body.get("echo") or "echo" not in self.manners.forms:
            return {}
        named: list[Any] = [None]
        named += [{f"t{best[at]}": tops[at], f"t{ids[at]}": own[at]} for at in range(1, len(ids))]
        written = [-1.0] * (1 + more)
        return {"logprobs": {"token_logprobs": own + written, "top_logprobs": named + [{"x": -1.0}] * (1 + more)}}

    def _usage(self, body: dict[str, Any], written: int) -> dict[str, int]:
        prompt, found = body["prompt"], {"completion_tokens": written}
        ids = self.tokenizer.encode(prompt) if self.tokenizer and isinstance(prompt, str) else prompt
        return found | ({"prompt_tokens": len(ids) + self.manners.extra} if isinstance(ids, list) else {})

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.manners.streamed += 1
        if self.manners.every and self.manners.streamed % self.manners.every == 0:
            self._event({"error": {"message": "out of memory"}})
            return
        for _ in range(body["max_tokens"]):
            said = {"delta": {"content": "é"}} if self.manners.chats else {"text": "é"}
            self._event({"choices": [{"index": 0, "finish_reason": None, **said}]})
            time.sleep(0.002)
        self._event({"choices": [], "usage": self._usage(body, body["max_tokens"])})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(
    manners: Manners,
    model: Runtime | None = None,
    tokenizer: Tokenizer | None = None,
    tls: ssl.SSLContext | None = None,
    port: int = 0,
) -> Iterator[str]:
    """Runs the server; gives the URL of its API."""
    with _quiet(("127.0.0.1", port), manners, model, tokenizer) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def _quiet(
    place: tuple[str, int], manners: Manners, model: Runtime | None, tokenizer: Tokenizer | None
) -> ThreadingHTTPServer:
    shared = {"manners": manners, "model": model, "tokenizer": tokenizer, "lock": threading.Lock()}

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Prints nothing about callers that go away."""

    return Server(place, type("Handler", (_Handler,), shared))
