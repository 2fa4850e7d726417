"""Runs many similar pieces of work on all cores: forked workers, results in order.

Small products gain little from a second thread. So whole layers are shared out, and not the inside of each layer. The
number of workers and of the threads of each depends on the machine and the model alone, never on what else runs. So
results are the same every time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import torch

from lighten.errors import Failure
from lighten.process.isolate import CAN_FORK, call, count_helpers, death, die_with, peak_rss_bytes, raised

MEMORY_SHARE = 0.5
"""Share of the machine's memory that all workers together may take."""


def crew(count: int, bytes_each: int, device: str) -> int:
    """Returns the number of workers for `count` pieces of work; each piece takes `bytes_each` of memory."""
    if device != "cpu" or not CAN_FORK:
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(count, torch.get_num_threads(), int(MEMORY_SHARE * memory) // max(1, bytes_each)))


def ordered(
    function: Callable[[int], Any], count: int, workers: int, report: Callable[[int], None] = lambda done: None
) -> Iterator[Any]:
    """Yields `function(0)` … `function(count - 1)`, each called in one of `workers` forked processes.

    The result of the function passes through JSON. It leaves larger things in files. One worker is this process.

    Args:
        function: the work.
        count: number of pieces.
        workers: number of processes that share torch's threads.
        report: called with the number of finished pieces.

    Raises:
        RequestError, Failure: as raised by the function, or a Failure if a worker crashed.
    """
    if workers == 1:
        for index in range(count):
            value = function(index)
            report(index + 1)
            yield value
        return
    context = multiprocessing.get_context("fork")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork: none may be there
    turn = context.Value("i", 0)
    team: dict[Any, Any] = {}
    peaks: dict[Any, int] = {}
    shared = peak_rss_bytes()
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(function, turn, count, theirs, os.getpid(), before // workers), daemon=True
            )
            process.start()
            theirs.close()
            team[ours] = process
        yield from _gather(team, peaks, count, report)
    finally:
        count_helpers(sum(max(0, peak - shared) for peak in peaks.values()))
        for ours, process in team.items():
            process.kill()
            process.join()
            ours.close()
        torch.set_num_threads(before)


def _gather(team: dict[Any, Any], peaks: dict[Any, int], count: int, report: Callable[[int], None]) -> Iterator[Any]:
    waiting: dict[int, Any] = {}
    done = sent = 0
    open_ends = list(team)
    while sent < count:
        for ours in connection.wait(open_ends):
            assert isinstance(ours, connection.Connection)
            try:
                index, event = json.loads(ours.recv_bytes())
            except EOFError:
                open_ends.remove(ours)
                team[ours].join()
                if team[ours].exitcode:
                    raise Failure(f"a worker crashed ({death(team[ours].exitcode)})") from None
                continue
            if "error" in event:
                raise raised(event)
            waiting[index] = event["value"]
            peaks[ours] = event["peak_rss_bytes"]
            report(done := done + 1)
        while sent in waiting:
            yield waiting.pop(sent)
            sent += 1


def _work(
    function: Callable[[int], Any], turn: Any, count: int, answers: connection.Connection, parent: int, threads: int
) -> None:
    die_with(parent)
    torch.set_num_threads(max(1, threads))
    while True:
        with turn.get_lock():
            index = turn.value
            turn.value += 1
        if index >= count:
            return
        answers.send_bytes(json.dumps([index, call(function, index)]).encode())
