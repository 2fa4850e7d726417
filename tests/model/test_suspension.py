"""Batches that halt before blocks compute what the plain forward computes."""

import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lighten.model.suspension import Place, Turn, turns


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, states: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, str]:
        return states + scale * self.linear(states), "beside"


def answer(turn: Turn) -> None:
    with torch.inference_mode():
        for call in turn.calls:
            turn.answer(call)


class Stack(nn.Module):
    """Blocks with code between them, a state that passes by them, and one block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        first = states
        for number, block in enumerate([*self.blocks, self.blocks[0]]):
            states = torch.tanh(block(states, scale=number / 2)[0]) + 0.1 * first
        return self.head(states)


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def test_every_block_waits_for_every_batch(stack: Stack) -> None:
    batches = [torch.randn(2, 3, 4) for _ in range(5)]
    with torch.inference_mode():
        expected = [stack(batch) for batch in batches]
    found: dict[int, torch.Tensor] = {}
    order = []

    def forward(batch: int) -> None:
        found[batch] = stack(batches[batch])

    blocks = {f"blocks.{number}": block for number, block in enumerate(stack.blocks)}
    for turn in turns(forward, 5, blocks):
        order.append(turn.name)
        assert [call.batch for call in turn.calls] == [0, 1, 2, 3, 4]
        assert turn.number == len(order) - 1
        answer(turn)
    assert order == ["blocks.0", "blocks.1", "blocks.2", "blocks.0"]
    assert all(torch.equal(found[batch], expected[batch]) for batch in range(5))
    assert all("forward" not in block.__dict__ for block in stack.blocks)


def test_a_batch_that_goes_on_keeps_nothing_beside_what_others_get(stack: Stack) -> None:
    batches = [torch.randn(2, 3, 4) for _ in range(3)]
    with torch.inference_mode():
        expected = [stack.blocks[1](stack.blocks[0](batch)[0])[0] for batch in batches]
    found: dict[int, torch.Tensor] = {}
    given: list[weakref.ref[torch.Tensor]] = []

    def forward(batch: int) -> None:
        states = batches[batch] + 0
        for block in stack.blocks[:2]:
            states = block(states)[0]
        found[batch] = states

    for turn in turns(forward, 3, {f"{number}": stack.blocks[number] for number in (0, 1)}):
        assert not any(each() is not None for each in given)
        given = [weakref.ref(call.args[0]) for call in turn.calls]
        for done, call in enumerate(turn.calls):
            with torch.inference_mode():
                turn.answer(call)
            turn.go_on(call)
            turn.go_on(call)
            assert (call.args, call.kwargs, call.answer) == ((), {}, None)
            assert [each() is None for each in given] == [number <= done for number in range(3)]
            assert turn.name == "0" or list(found) == list(range(done + 1))
    assert all(torch.equal(found[batch], expected[batch]) for batch in range(3))


def test_a_block_that_changes_during_its_turn_answers_as_changed(stack: Stack) -> None:
    batch, changed = torch.randn(1, 3, 4), Stack().eval()
    changed.load_state_dict(stack.state_dict())
    with torch.no_grad():
        for block in changed.blocks:
            block.linear.weight.mul_(0.5)
        expected = changed(batch)
    found = []
    seen = set()
    for turn in turns(lambda _: found.append(stack(batch)), 1, {str(n): b for n, b in enumerate(stack.blocks)}):
        with torch.no_grad():
            if turn.name not in seen:
                stack.blocks[int(turn.name)].linear.weight.mul_(0.5)
            seen.add(turn.name)
        answer(turn)
    assert torch.allclose(found[0], expected)


def test_the_call_of_a_module_ends_the_forward(stack: Stack) -> None:
    ended = []

    def forward(batch: int) -> None:
        stack(torch.ones(1, 1, 4))
        ended.append(batch)

    for turn in turns(forward, 2, {"0": stack.blocks[0]}, ends=stack.head):
        answer(turn)
    assert ended == [] and "forward" not in stack.head.__dict__


def test_the_error_of_a_forward_is_raised_and_nothing_is_left_behind(stack: Stack) -> None:
    before = threading.active_count()

    def forward(batch: int) -> None:
        stack(torch.ones(1, 1, 4))
        if batch == 1:
            raise ArithmeticError("batch 1")

    with pytest.raises(ArithmeticError, match="batch 1"):
        for turn in turns(forward, 3, {"0": stack.blocks[0]}):
            answer(turn)
    assert threading.active_count() == before
    assert "forward" not in stack.blocks[0].__dict__


def test_a_caller_that_stops_ends_the_threads(stack: Stack) -> None:
    before = threading.active_count()
    running = turns(lambda _: stack(torch.ones(1, 1, 4)), 3, {"0": stack.blocks[0]})
    next(running)
    assert threading.active_count() == before + 3
    running.close()
    assert threading.active_count() == before


def test_gradients_flow_through_a_turn_without_inference(stack: Stack) -> None:
    batch = torch.randn(1, 3, 4)
    stack(batch).sum().backward()
    expected = stack.blocks[1].linear.weight.grad
    assert expected is not None
    expected = expected.clone()
    stack.zero_grad()
    made: list[Any] = []
    for turn in turns(lambda _: made.append(stack(batch)), 1, {"1": stack.blocks[1]}, inference=False):
        turn.answer(turn.calls[0])
    made[0].sum().backward()
    assert torch.equal(stack.blocks[1].linear.weight.grad, expected)


def test_states_wait_where_they_are_told_to(stack: Stack) -> None:
    moved = []

    class Counted(Place):
        def stow(self, value: Any) -> Any:
            moved.append("stowed")
            return value

        def fetch(self, value: Any) -> Any:
            moved.append("fetched")
            return value

    for turn in turns(lambda _: stack(torch.ones(1, 1, 4)), 1, {"1": stack.blocks[1]}, place=Counted("cpu", "cpu")):
        answer(turn)
    assert moved == ["stowed", "fetched", "stowed", "fetched"]


def test_an_error_ends_the_process_while_batches_wait() -> None:
    script = (
        "import torch\n"
        "from lighten.model.suspension import turns\n"
        "block = torch.nn.Linear(2, 2)\n"
        "halts = turns(lambda number: block(torch.ones(1, 2)), 2, {'block': block})\n"
        "next(halts)\n"
        "raise KeyError('stop here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "stop here" in done.stderr
