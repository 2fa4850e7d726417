"""Running a model's own forward for many batches, and halting all of them before each of its blocks.

Every batch runs in a thread of its own, one thread at a time. A block's call waits until each batch has come as far.
The caller then runs the block for all of them, and they go on. Nothing is assumed about a block's arguments, about
the code between blocks, or about states that pass by them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lighten.process.isolate import give_back, share_arena

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends the thread of a batch whose forward is not needed any further. `except Exception` lets it pass."""


@dataclass(frozen=True)
class Place:
    """Where states wait: on the device, or on the CPU if they do not fit beside a block."""

    device: str
    waits: str

    def stow(self, value: Any) -> Any:
        """Returns arguments or answers as they wait."""
        return _moved(value, self.waits) if self.waits != self.device else value

    def fetch(self, value: Any) -> Any:
        """Returns arguments or answers on the device."""
        return _moved(value, self.device) if self.waits != self.device else value


def _moved(value: Any, device: str) -> Any:
    return tree_map(lambda each: each.to(device) if isinstance(each, torch.Tensor) else each, value)


@dataclass
class Call:
    """A call of a block by one batch."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Any = None
    """What the block gives back. The caller sets it."""


@dataclass
class Turn:
    """Calls of one block, by every batch that waits before it."""

    name: str
    """Name of the block in the model."""
    number: int
    """Number of turns before this one. A block that the model runs twice has two."""
    run: Callable[..., Any] = field(repr=False)
    """The block's own forward. It takes a call's arguments."""
    calls: list[Call] = field(repr=False)
    place: Place = field(repr=False)
    go_on: Callable[..., None] = field(repr=False)
    """Lets the batches of answered calls run to their next block at once. Arguments and answers are gone then.

    So they are not held beside what other batches get. Batches that are left go on before the next turn.
    """

    def answer(self, call: Call, run: Callable[..., Any] | None = None) -> None:
        """Runs the block for a call, or another forward in its place, and keeps what it gives back."""
        args, kwargs = self.place.fetch((call.args, call.kwargs))
        call.answer = self.place.stow((run or self.run)(*args, **kwargs))


class _Batch:
    """The thread of one batch."""

    def __init__(self, number: int, forward: Callable[[int], Any], inference: bool, place: Place) -> None:
        self.number, self.place = number, place
        self.waits: tuple[str, Call] | None = None
        self.error: BaseException | None = None
        self.done = False
        self.stopped = False
        self._forward, self._inference = forward, inference
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name=f"batch-{number}", daemon=True)

    def _main(self) -> None:
        self._go.acquire()
        torch.set_num_threads(1)  # of this thread
        try:
            # the grad mode is the thread's own
            with torch.inference_mode(self._inference), torch.set_grad_enabled(not self._inference):
                if not self.stopped:
                    self._forward(self.number)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        give_back()  # what follows the last block took room in this thread's arena
        self._halted.release()

    def resume(self) -> None:
        """Lets the thread run on."""
        if not self._thread.ident:
            self._thread.start()
        self.waits = None
        self._go.release()

    def arrive(self) -> None:
        """Waits until the thread that was resumed is at the next block, or at its end."""
        self._halted.acquire()

    def halt(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Waits before a block, in the thread; returns the block's answer."""
        call = Call(self.number, *self.place.stow((args, kwargs)))
        self.waits = (name, call)
        del args, kwargs
        self._halted.release()
        self._go.acquire()
        if self.stopped:
            raise _Stopped
        answer, call.answer = call.answer, None
        return self.place.fetch(answer)

    def stop(self) -> None:
        """Ends the thread."""
        if self._thread.ident and not self.done and not sys.is_finalizing():  # Python ends threads by itself then
            self.stopped = True
            self._go.release()
            self._halted.acquire()


def turns(
    forward: Callable[[int], Any],
    batches: int,
    blocks: Mapping[str, nn.Module],
    *,
    ends: nn.Module | None = None,
    inference: bool = True,
    place: Place = Place("cpu", "cpu"),
    at_once: int = 1,
    straight: Callable[[str, int], Callable[..., Any] | None] = lambda *_: None,
) -> Iterator[Turn]:
    """Yields the turn of each block, in the order in which the model runs them.

    The caller answers every call of a turn before it asks for the next. Arguments of a call are dropped as soon as the
    batch goes on, see `Turn.go_on`.

    Args:
        forward: runs the model for the batch of a number.
        batches: number of batches.
        blocks: modules to halt before, by name.
        ends: module whose call ends the forward; the head, if nobody needs logits.
        inference: whether the threads run in inference mode; without it, they record gradients.
        place: where states wait.
        at_once: number of batches that run between blocks at the same time, each on one thread. With more threads,
            each batch would have a crew of its own, and OpenMP would no longer let its threads wait awake.
        straight: gets the name of a block and the number of a batch that calls it. Returns what answers the call in
            the thread of the batch, which is not halted then; None if it is.

    Raises:
        BaseException: whatever the forward of a batch raised.
    """
    share_arena()
    each = [_Batch(number, forward, inference, place) for number in range(batches)]

    def go_on(*calls: Call) -> None:
        ready = [each[call.batch] for call in calls if (waits := each[call.batch].waits) and waits[1] is call]
        for batch in ready:
            assert batch.waits
            batch.waits[1].args, batch.waits[1].kwargs = (), {}
        _advance(ready)

    own_threads = torch.get_num_threads()
    with _halting(each, blocks, ends, straight) as own:
        try:
            for some in _parts(each, at_once):
                _advance(some)
            torch.set_num_threads(own_threads)  # for threads that start later
            number = 0
            while waiting := [batch for batch in each if batch.waits]:
                name = _first(waiting)
                calls = [batch.waits[1] for batch in waiting if batch.waits and batch.waits[0] == name]
                yield Turn(name, number, own[name], calls, place, go_on)
                number += 1
                for part in _parts(calls, at_once):
                    go_on(*part)
        finally:
            for batch in each:
                batch.stop()


def _parts(whole: list[T], size: int) -> list[list[T]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _advance(batches: list[_Batch]) -> None:
    """Lets threads run to their next block, or to their end. Raises the error of a forward."""
    for batch in batches:
        batch.resume()
    for batch in batches:
        batch.arrive()
    for batch in batches:
        if batch.error is not None:
            raise batch.error


def _first(waiting: list[_Batch]) -> str:
    """Returns the name of the block that the batches furthest behind wait for."""
    assert waiting[0].waits
    return waiting[0].waits[0]


@contextmanager
def _halting(
    each: list[_Batch],
    blocks: Mapping[str, nn.Module],
    ends: nn.Module | None,
    straight: Callable[[str, int], Callable[..., Any] | None],
) -> Iterator[dict[str, Callable[..., Any]]]:
    """Puts a halt in the place of the blocks' forwards; yields those forwards by name."""
    threads = {batch._thread: batch for batch in each}
    own: dict[str, Callable[..., Any]] = {}

    def halt(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = threads.get(threading.current_thread())
            if batch is None:
                return own[name](*args, **kwargs)
            run = straight(name, batch.number)
            return run(*args, **kwargs) if run else batch.halt(name, args, kwargs)

        return forward

    def end(*_: Any, **__: Any) -> Any:
        raise _Stopped

    places = [*blocks.values(), *([ends] if ends is not None else [])]
    try:
        for name, block in blocks.items():
            own[name] = block.forward
            block.forward = halt(name)
        if ends is not None:
            ends.forward = end
        yield own
    finally:
        for module in places:
            module.__dict__.pop("forward", None)
