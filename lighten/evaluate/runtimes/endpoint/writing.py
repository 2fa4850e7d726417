"""What a server writes, as a stream: the moment at which each token arrived."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lighten.evaluate.runtimes.endpoint.connection import Declined, Http
from lighten.evaluate.runtimes.endpoint.scoring import first

Route = Literal["completions", "chat/completions"]
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
WISHES: tuple[dict[str, Any], ...] = (
    {"ignore_eos": True, "cache_prompt": False, "timings_per_token": True, **USAGE},
    {"stream_options": {"include_usage": True}},
    {},
)
"""What streams are asked for besides, the first that a server takes: to write through the end of a text, to read every
prompt anew, and to count tokens. llama.cpp and vLLM each know some of the first ones."""
BANNED = -100
"""Bias that prevents the choice of a token."""


@dataclass(frozen=True)
class Written:
    """An answer."""

    moments: list[float]
    """The moment (`time.perf_counter`) at which each token arrived, also of tokens that came in one piece."""
    prompt: int | None
    """Tokens of the prompt, as the server counts them; None if it does not say."""


class Writer:
    """Lets a server write behind a prompt."""

    def __init__(self, http: Http, model: str, route: Route, wishes: dict[str, Any]) -> None:
        self.http, self.model, self.route, self.wishes = http, model, route, wishes

    def write(self, prompt: str | list[int], steps: int, banned: list[int] | None = None) -> Written:
        """Streams a greedy answer.

        Args:
            prompt: text, or ids if the server takes them.
            steps: tokens at most.
            banned: ids that are not to be written, unless the server writes through the end of a text anyway.

        Raises:
            Declined: the server refuses, or stops before the end.
            RequestError, Failure: see `Http.stream`.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": steps,
            "temperature": 0,
            "stream": True,
            **self.wishes,
        }
        if self.route == "completions":
            body["prompt"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        if banned and "ignore_eos" not in self.wishes:
            body["logit_bias"] = {str(token): BANNED for token in banned}
        moments: list[float] = []
        count = read = None
        for moment, event in self.http.stream(f"{self.http.address.url}/{self.route}", body):
            count, read = counts(event, count, read)
            new = len(moments) + bool(piece(event)) if count is None else count
            moments += [moment] * (new - len(moments))
        return Written(moments, read)


def piece(event: dict[str, Any]) -> str:
    """Returns the text that an event brings, thoughts too."""
    if not event.get("choices"):
        return ""
    choice = first(event)
    delta = choice.get("delta") or {}
    parts = choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning")
    return "".join(part for part in parts if isinstance(part, str))


def counts(event: dict[str, Any], written: int | None, read: int | None) -> tuple[int | None, int | None]:
    """Returns how many tokens a server says it has written and read so far; the earlier numbers if it does not say."""
    timings, usage = (event.get(name) or {} for name in ("timings", "usage"))
    written = usage.get("completion_tokens", timings.get("predicted_n", written))
    return written, usage.get("prompt_tokens", read)


def find_writer(http: Http, model: str, ids: list[int] | None, text: str) -> tuple[Writer | None, bool, str]:
    """Returns a writer, whether it takes ids as a prompt, and what the server said if there is none.

    Args:
        http: the server.
        model: name on the server.
        ids: ids of a short text; None if they are not known.
        text: a short text.
    """
    said: dict[str, None] = {}
    ways: list[tuple[Route, str | list[int]]] = [("completions", text), ("chat/completions", text)]
    if ids:
        ways.insert(0, ("completions", ids))
    for route, prompt in ways:
        for wishes in WISHES:
            writer = Writer(http, model, route, wishes)
            try:
                found = http.patiently(partial(writer.write, prompt, 2))
            except Declined as error:
                said[f"/{route}: {error}"] = None
                if error.status in (404, 405, 501):
                    break
                continue
            if isinstance(prompt, list) and found.prompt not in (None, len(prompt)):
                break  # it has read something else
            return writer, isinstance(prompt, list), ""
    return None, False, "; ".join(said)
