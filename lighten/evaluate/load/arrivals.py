"""Requests that keep arriving: throughput, time to the first token, and time between tokens as a user sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lighten.data.origin import text_name
from lighten.data.text import Render, load_text
from lighten.errors import Failure
from lighten.evaluate.load.settings import Load
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import for_speed
from lighten.evaluate.runtimes.choose import find_opener
from lighten.evaluate.runtimes.runtime import Runtime, Server, Tokenizer
from lighten.evaluate.speed.server import Refused
from lighten.evaluate.speed.shapes import percentiles
from lighten.evaluate.stored_result import LoadResult
from lighten.model.template import renderer
from lighten.results.measured import ServedLoad
from lighten.step import Report

MARGIN = 32
"""Number of tokens that a server may count more than lighten: special tokens, or another cut."""


@dataclass(frozen=True)
class Served:
    """One request: the moments of its arrival and of each of its tokens, in seconds from the start of the load."""

    arrived: float
    tokens: list[float]


def arrival_times(settings: Load, rate: float) -> list[float]:
    """Returns the moments of arrival: a Poisson process. A seed gives the same process, scaled, at every rate."""
    return list(np.random.default_rng(settings.seed).exponential(1 / rate, settings.requests).cumsum())


def row(rate: float, asked: int, served: list[Served], server: str) -> ServedLoad:
    """Returns the result of one rate. Tokens per second are counted from the first arrival to the last token.

    Raises:
        Failure: no request was completed.
    """
    if not served:
        raise Failure(f"{server} completed none of {asked} requests at {rate:g} a second")
    passed = max(each.tokens[-1] for each in served) - min(each.arrived for each in served)
    between = [later - earlier for each in served for earlier, later in pairwise(each.tokens)]
    return ServedLoad(
        rate=rate,
        requests=asked,
        completed=len(served),
        throughput_tok_s=sum(len(each.tokens) for each in served) / passed,
        ttft_ms=percentiles([each.tokens[0] - each.arrived for each in served]),
        token_ms=percentiles(between) if between else None,
        server=server,
    )


def measure(request: Request[Load], report: Report) -> LoadResult:
    """Returns `load`, a row for each rate, and what served it.

    Raises:
        Failure: the server died, or served nothing.
    """
    settings, path, device = request.settings, request.model, request.device
    found, place = find_opener(path)
    if server := found.server(place, settings.prompt + settings.generate + MARGIN, device):
        return _over_http(server, found.tokenizer(place), renderer(path), settings, report).having(runtime=found.name)
    runtime = for_speed(request)
    ids = np.array(_pieces(runtime, settings, renderer(path)))
    runtime.generate(ids[:1], 2)  # warms up
    rows = []
    for number, rate in enumerate(settings.rate):
        served = batched(runtime, ids, arrival_times(settings, rate), settings)
        rows.append(row(rate, settings.requests, served, f"batched loop of lighten, at most {settings.batch} together"))
        report(number + 1, len(settings.rate), f"{rows[-1].throughput_tok_s:.0f} tok/s")
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


def _over_http(
    opening: AbstractContextManager[Server], tokenizer: Tokenizer, render: Render | None, settings: Load, report: Report
) -> LoadResult:
    prompts = [tokenizer.decode(piece) for piece in _pieces(tokenizer, settings, render)]
    rows = []
    with opening as server:
        banned = [] if tokenizer.eos is None else [tokenizer.eos]

        def ask(prompt: str) -> list[float]:
            return server.stream(prompt, settings.generate, banned)

        ask(prompts[-1])  # warms up
        for number, rate in enumerate(settings.rate):
            served = concurrent(ask, prompts, arrival_times(settings, rate))
            server.check(f"after {len(served)} of {settings.requests} requests at {rate:g} a second")
            rows.append(row(rate, settings.requests, served, server.name))
            report(number + 1, len(settings.rate), f"{rows[-1].throughput_tok_s:.0f} tok/s")
    return LoadResult(load=rows, device=server.device)


def concurrent(ask: Callable[[str], list[float]], prompts: list[str], times: list[float]) -> list[Served]:
    """Returns the requests that were answered; `ask` gives the moments of a prompt's tokens, or raises `Refused`."""
    start = time.perf_counter()

    def one(prompt: str, arrival: float) -> Served | None:
        time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
        try:
            tokens = [moment - start for moment in ask(prompt)]
        except Refused:
            return None
        return Served(arrival, tokens) if tokens else None

    with ThreadPoolExecutor(len(times)) as pool:
        return [each for each in pool.map(one, prompts, times) if each]


def _pieces(tokenizer: Tokenizer | Runtime, settings: Load, render: Render | None = None) -> list[list[int]]:
    """Returns a piece of the text for each request, all different as long as the text lasts."""
    ids = tokenizer.encode(load_text(settings.data, "perplexity", render))
    pieces = len(ids) // settings.prompt
    if not pieces:
        raise Failure(
            f"the text {text_name(settings.data)} has {len(ids)} tokens, fewer than a prompt of {settings.prompt}"
        )
    return [ids[at % pieces * settings.prompt :][: settings.prompt] for at in range(settings.requests)]
