"""The head in 8 bits: what its inputs are divided by, against definitions and on inputs that were not seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lighten.export.executorch import head as heads
from lighten.export.executorch.inputs import EVENED, rounded_inputs
from lighten.export.executorch.linears import compensated

WIDTH, VOCAB = 64, 300


class Model(nn.Module):
    """Rows of a table, and a head that reads them."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.table = torch.randn(500, WIDTH, generator=numbers) + 0.5
        self.table[:, 7] *= loud
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight.data = torch.randn(VOCAB, WIDTH, generator=numbers) / 8
        self.head.weight.data[:, 7] /= loud

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        found: torch.Tensor = self.head(self.table[input_ids])
        return found


def ids(seed: int) -> torch.Tensor:
    return torch.randint(500, (4, 100), generator=torch.Generator().manual_seed(seed))


def test_what_comes_to_a_head_is_heard_once() -> None:
    model = Model(3)
    assert torch.equal(heads.inputs_of(model, ids(0), model.head), model.table[ids(0)].flatten(0, 1))
    assert not model.head._forward_pre_hooks


def test_the_worth_of_inputs_and_outputs_is_that_of_the_definition() -> None:
    model = Model(3)
    inputs = model.table[ids(0)[0]]
    of_inputs, of_outputs = heads._worth(inputs, model.head)
    weight = model.head.weight.double()
    wanted_in, wanted_out = torch.zeros(WIDTH).double(), torch.zeros(VOCAB).double()
    for row in inputs.double():
        likely = (weight @ row).softmax(0)
        middle = sum(share * each for share, each in zip(likely, weight, strict=True))
        for share, each in zip(likely, weight, strict=True):
            wanted_in += share * (each - middle).square() / len(inputs)
        wanted_out += likely * (1 - likely) / len(inputs)
    assert torch.allclose(of_inputs.double(), wanted_in, rtol=1e-4, atol=1e-9)
    assert torch.allclose(of_outputs.double(), wanted_out, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("loud", [8.0, 40.0])
def test_a_head_of_evened_inputs_costs_less_on_tokens_that_were_not_seen(loud: float) -> None:
    """Both roundings together, in nats: less than without, and less than with fourth roots of deviations."""
    model = Model(loud)
    model.head.weight.data *= 3
    seen, fresh = model.table[ids(0)].flatten(0, 1), model.table[ids(1)].flatten(0, 1)
    found = heads.evened(seen, model.head)
    assert found is not None
    assert int(found.argmax()) == 7 and float(found.log().mean().abs()) < 0.02
    assert float(found.min()) >= 1 / EVENED
    assert float(found.max()) <= EVENED
    roots = seen.std(0) ** 0.25
    plain, rooted, evened = (_cost(model, seen, fresh, each) for each in (torch.ones(WIDTH), roots, found))
    assert evened < 0.4 * plain
    assert evened < rooted


@torch.no_grad()
def _cost(model: Model, seen: torch.Tensor, fresh: torch.Tensor, even: torch.Tensor) -> float:
    stored, middle = compensated(model.head.weight, seen.T @ seen, even), seen.mean(0)
    shown = rounded_inputs((fresh - middle) / even) * even + middle
    wanted = (fresh @ model.head.weight.T).log_softmax(-1)
    rounded = (shown @ (stored.codes * stored.scales / even).T).log_softmax(-1)
    return float((wanted.exp() * (wanted - rounded)).sum(-1).mean())


@pytest.mark.parametrize("broken", ["constant", "not a number", "no weights", "no token"])
def test_inputs_that_tell_nothing_are_not_divided(broken: str) -> None:
    model = Model(3)
    inputs = model.table[ids(0)].flatten(0, 1)
    if broken == "constant":
        inputs[:] = 0
    elif broken == "not a number":
        inputs[3, 3] = float("nan")
    elif broken == "no weights":
        model.head.weight.data.zero_()
    else:
        inputs = inputs[:0]
    assert heads.evened(inputs, model.head) is None
