"""Requests that keep arriving: throughput, time to the first token, and time between tokens as a user sees them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np

from lighten.data.origin import text_name
from lighten.data.text import Render, load_text
from lighten.errors import Failure
from lighten.evaluate.load.settings import MARGIN, Load
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import for_speed, renderer_of
from lighten.evaluate.runtimes.choose import find_opener
from lighten.evaluate.runtimes.runtime import Runtime, Server, Tokenizer
from lighten.evaluate.speed.server import Refused
from lighten.evaluate.speed.shapes import percentiles
from lighten.evaluate.stored_result import LoadResult
from lighten.results.measured import ServedLoad
from lighten.step import Report

MOST_ERRORS, LONGEST_REASON = 5, 160
"""Number of reasons for failed requests that are kept, the most frequent ones, and letters of each."""


@dataclass(frozen=True)
class Served:
    """One request: the moments of its arrival and of each of its tokens, in seconds from the start of the load."""

    arrived: float
    tokens: list[float]


def arrival_times(settings: Load, rate: float) -> list[float]:
    """Returns the moments of arrival: a Poisson process. A seed gives the same process, scaled, at every rate."""
    return list(np.random.default_rng(settings.seed).exponential(1 / rate, settings.requests).cumsum())


@dataclass(frozen=True)
class Round:
    """Requests that were sent in one way: so many a second on average, or by so many users."""

    rate: float | None = None
    users: int | None = None

    def __str__(self) -> str:
        users = "1 user" if self.users == 1 else f"{self.users} users"
        return f"at {self.rate:g} a second" if self.rate is not None else f"by {users}"


def rounds(settings: Load) -> list[Round]:
    """Returns what is measured, a row each: first the rates, then the numbers of users."""
    return [*(Round(rate=each) for each in settings.rate), *(Round(users=each) for each in settings.concurrency)]


def row(sent: Round, asked: int, served: list[Served], server: str, errors: Counter[str] | None = None) -> ServedLoad:
    """Returns the result of one round. Tokens per second are counted from the first arrival to the last token.

    Raises:
        Failure: no request was completed.
    """
    errors = errors or Counter()
    if not served:
        why = f": {errors.most_common(1)[0][0]}" if errors else ""
        raise Failure(f"{server} completed none of {asked} requests {sent}{why}")
    passed = max(each.tokens[-1] for each in served) - min(each.arrived for each in served)
    between = [later - earlier for each in served for earlier, later in pairwise(each.tokens)]
    return ServedLoad(
        rate=sent.rate,
        concurrency=sent.users,
        requests=asked,
        completed=len(served),
        throughput_tok_s=sum(len(each.tokens) for each in served) / passed,
        ttft_ms=percentiles([each.tokens[0] - each.arrived for each in served]),
        token_ms=percentiles(between) if between else None,
        errors=dict(errors.most_common(MOST_ERRORS)),
        server=server,
    )


def measure(request: Request[Load], report: Report) -> LoadResult:
    """Returns `load`, a row for each rate and each number of users, and what served it.

    Raises:
        Unavailable: the runtime does not write, or there is no tokenizer to make prompts.
        Failure: the server died, or served nothing.
    """
    settings, path, device = request.settings, request.model, request.device
    found, place = find_opener(path)
    render = renderer_of(path)
    if server := found.server(place, settings.prompt + settings.generate + MARGIN, device):
        return _over_http(server, found.tokenizer(place), render, settings, report).having(runtime=found.name)
    runtime = for_speed(request)
    ids = np.array(_pieces(runtime, settings, render))
    runtime.generate(ids[:1], 2)  # warms up
    rows, planned = [], rounds(settings)
    for number, sent in enumerate(planned):
        times = arrival_times(settings, sent.rate) if sent.rate is not None else None
        served = batched(runtime, ids, times, settings) if times else in_turn(runtime, ids, sent.users or 1, settings)
        rows.append(row(sent, settings.requests, served, f"batched loop of lighten, at most {settings.batch} together"))
        report(number + 1, len(planned), f"{rows[-1].throughput_tok_s:.0f} tok/s")
    return LoadResult(load=rows, runtime=runtime.name, device=runtime.device, dtype=runtime.dtype)


def batched(runtime: Runtime, ids: Any, times: list[float], settings: Load) -> list[Served]:
    """Serves prompts `ids [requests, prompt]` that arrive at `times`.

    Waiting requests are decoded together, to the end. A request that arrives meanwhile waits.
    """
    start, done = time.perf_counter(), 0
    served: list[Served] = []
    while done < len(times):
        now = time.perf_counter() - start
        waiting = sum(arrival <= now for arrival in times[done:])
        if not waiting:
            time.sleep(times[done] - now)
            continue
        batch = range(done, done + min(waiting, settings.batch))
        begin = time.perf_counter() - start
        found = runtime.generate(ids[batch], settings.generate)
        tokens = list(begin + np.cumsum([found.ttft_s, *found.token_s]))
        served += [Served(times[at], tokens) for at in batch]
        done = batch.stop
    return served


def in_turn(runtime: Runtime, ids: Any, users: int, settings: Load) -> list[Served]:
    """Serves prompts `ids [requests, prompt]` of users who send the next one when the last one is answered.

    At most `batch` requests are decoded together, to the end, those first that wait longest.
    """
    start, done = time.perf_counter(), 0
    waiting = deque([0.0] * min(users, len(ids)))
    served: list[Served] = []
    while done < len(ids):
        arrived = [waiting.popleft() for _ in range(min(len(waiting), settings.batch, len(ids) - done))]
        begin = time.perf_counter() - start
        found = runtime.generate(ids[done : done + len(arrived)], settings.generate)
        tokens = list(begin + np.cumsum([found.ttft_s, *found.token_s]))
        served += [Served(each, tokens) for each in arrived]
        done += len(arrived)
        waiting.extend([time.perf_counter() - start] * len(arrived))
    return served


def _over_http(
    opening: AbstractContextManager[Server], tokenizer: Tokenizer, render: Render | None, settings: Load, report: Report
) -> LoadResult:
    planned = rounds(settings)
    pieces = _pieces(tokenizer, settings, render, len(planned) * settings.requests)
    prompts = [tokenizer.decode(piece) for piece in pieces]
    rows = []
    with opening as server:
        banned = [] if tokenizer.eos is None else [tokenizer.eos]

        def ask(prompt: str) -> list[float]:
            return server.stream(prompt, settings.generate, banned)

        _warm_up(ask, prompts[-1], server.name)
        for number, sent in enumerate(planned):
            own = prompts[number * settings.requests :][: settings.requests]  # no server has read them before
            times = arrival_times(settings, sent.rate) if sent.rate is not None else None
            served, errors = concurrent(ask, own, times, sent.users)
            server.check(f"after {len(served)} of {settings.requests} requests {sent}")
            rows.append(row(sent, settings.requests, served, server.name, errors))
            report(number + 1, len(planned), f"{rows[-1].throughput_tok_s:.0f} tok/s")
    return LoadResult(load=rows, device=server.device)


def _warm_up(ask: Callable[[str], list[float]], prompt: str, server: str) -> None:
    try:
        ask(prompt)
    except Refused as error:
        raise Failure(f"{server} does not answer a first request: {error}") from error


def concurrent(
    ask: Callable[[str], list[float]], prompts: list[str], times: list[float] | None, users: int | None = None
) -> tuple[list[Served], Counter[str]]:
    """Returns the requests that were answered, and how often the others failed, by reason.

    Args:
        ask: gives the moments of a prompt's tokens, or raises `Refused`.
        prompts: the requests.
        times: moments of arrival in seconds from the start; None if a request arrives when a user is free.
        users: number of requests at the same time; None for all.
    """
    start = time.perf_counter()
    errors: Counter[str] = Counter()
    lock = Lock()

    def one(prompt: str, arrival: float | None) -> Served | None:
        if arrival is not None:
            time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
        else:
            arrival = time.perf_counter() - start
        try:
            tokens = [moment - start for moment in ask(prompt)]
            reason = "it answered without a token"
        except Refused as error:
            tokens, reason = [], str(error)[:LONGEST_REASON]
        if tokens:
            return Served(arrival, tokens)
        with lock:
            errors[reason] += 1
        return None

    with ThreadPoolExecutor(users or len(prompts)) as pool:
        found = [each for each in pool.map(one, prompts, times or [None] * len(prompts)) if each]
    return found, errors


def _pieces(
    tokenizer: Tokenizer | Runtime, settings: Load, render: Render | None = None, count: int | None = None
) -> list[list[int]]:
    """Returns `count` pieces of the text, one for each request, all different as long as the text lasts."""
    ids = tokenizer.encode(load_text(settings.data, "perplexity", render))
    pieces = len(ids) // settings.prompt
    if not pieces:
        raise Failure(
            f"the text {text_name(settings.data)} has {len(ids)} tokens, fewer than a prompt of {settings.prompt}"
        )
    wanted = settings.requests if count is None else count
    return [ids[at % pieces * settings.prompt :][: settings.prompt] for at in range(wanted)]
