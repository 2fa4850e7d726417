import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

pytest.importorskip("executorch.exir")

from lighten.export.executorch import inputs as rounding
from lighten.export.executorch.inputs import EVENED, EVENING, Asked, Way, choose, even, rounded_inputs
from tests.families.models import make


@given(st.integers(0, 1000), st.sampled_from(["spread", "above", "zero"]))
def test_inputs_are_rounded_as_torchao_rounds_them(seed: int, kind: str) -> None:
    from lighten.export.executorch.linears import _seen
    from lighten.model.executorch_library import load

    load("a test")
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    rows = {"spread": rows * 30, "above": rows.abs() + 3, "zero": rows * 0}[kind]
    found, wanted = rounded_inputs(rows), _seen(rows)
    step = (rows.amax(-1).clamp(min=0) - rows.amin(-1).clamp(max=0))[:, None] / 255
    assert ((found - wanted).abs() <= step * 1.001).all()  # a tie may fall to either side
    assert ((found - wanted).abs() > step / 2).float().mean() < 0.02


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=6))
def test_upgrades_lead_to_the_best_way_by_steps_of_falling_worth(others: list[tuple[int, float]]) -> None:
    works, costs = [0, *(each[0] for each in others)], [0.5, *(each[1] for each in others)]
    ways = [Way(edge=float(number)) for number in range(len(works))]
    found = rounding._upgrades(works, costs, ways)
    worths = [gain / work for gain, work, _ in found]
    assert all(gain > 0 and work > 0 for gain, work, _ in found)
    assert all(second <= first * (1 + 1e-9) for first, second in pairwise(worths))
    assert costs[0] - sum(gain for gain, _, _ in found) == pytest.approx(min(costs), abs=1e-12)


class Loud:
    """A small model with loud inputs, and its linears."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(make("llama", folder), dtype=torch.float32).eval()
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.model.lm_head.weight *= 4  # so that what a token says matters
            for layer in self.model.model.layers:
                layer.post_attention_layernorm.weight[3] = 40.0
        vocab = self.model.config.vocab_size
        self.ids = torch.randint(5, vocab, (2, 48), generator=numbers)
        self.linears = {n: each for n, each in self.model.named_modules() if isinstance(each, torch.nn.Linear)}
        self.asked = {
            each: Asked(8, each.in_features) if name == "lm_head" else Asked(4, 32)
            for name, each in self.linears.items()
        }

    @torch.no_grad()
    def measured(self, ways: dict[torch.nn.Linear, Way]) -> float:
        """Returns the divergence of the model whose linears round so, by brute force."""
        plain = self.model(self.ids).logits.log_softmax(-1)
        hooks = [
            linear.register_forward_pre_hook(lambda _, given, way=way: (way.shown(given[0]),))  # type: ignore[misc]
            for linear, way in ways.items()
        ]
        rounded = self.model(self.ids).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        return float((plain.exp() * (plain - rounded)).sum(-1).mean())


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Loud:
    return Loud(tmp_path_factory.mktemp("loud"))


def test_estimated_costs_are_those_that_are_measured(loud: Loud, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (1e9, 0.0):
        monkeypatch.setattr(rounding, "ALLOWED", allowed)
        found = choose(loud.model, loud.ids, loud.asked)
        assert found.error is None
        assert 0.5 < found.cost / loud.measured(found.ways) < 2, allowed
        assert (found.cost == found.together) == (allowed > 1)
    assert found.cost < 0.6 * found.together
    assert any(way.center is not None for way in found.ways.values())


def test_work_is_done_only_until_the_cost_is_allowed(loud: Loud, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(found: rounding.Found) -> int:
        return sum(way.work(linear) for linear, way in found.ways.items())

    monkeypatch.setattr(rounding, "ALLOWED", 0.0)
    least = choose(loud.model, loud.ids, loud.asked)
    allowed = (least.cost + least.together) / 2
    monkeypatch.setattr(rounding, "ALLOWED", allowed)
    found = choose(loud.model, loud.ids, loud.asked)
    assert least.cost < found.cost <= allowed and 0 < work(found) < work(least)


def test_a_model_without_gradients_rounds_all_in_two_parts(loud: Loud, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no derivative of an operator")

    monkeypatch.setattr(rounding, "_costs", fail)
    found = choose(loud.model, loud.ids, loud.asked)
    assert found.error == "no derivative of an operator"
    assert all(way.parts == 2 for linear, way in found.ways.items() if linear is not loud.model.lm_head)


def test_a_linear_that_no_token_reaches_is_left_as_it_is(loud: Loud) -> None:
    apart = torch.nn.Linear(64, 8)
    found = choose(loud.model, loud.ids, {**loud.asked, apart: Asked(4, 32)})
    assert found.ways[apart].parts == 1 and dataclasses.asdict(found.ways[apart]) == dataclasses.asdict(Way())


def test_numbers_that_even_inputs_follow_their_deviation(loud: Loud) -> None:
    """They are those of a definition in float64; an input that never changes gets the smallest, and none is out."""
    linear = torch.nn.Linear(6, 2)
    rows = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 0, 1, 0.2, 1])
    rows += torch.tensor([0.0, 0, 0, 1e4, 3, 0])
    rows[..., 5] = 7.3

    class Reads(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
            linear(rows[input_ids[0]])

    found = even(Reads(), torch.arange(4)[:, None], [linear, torch.nn.Linear(6, 2)])
    assert list(found) == [linear]
    deviation = rows.double().flatten(0, 1).std(0, correction=0)[[0, 1, 3, 4]]
    wanted = deviation**EVENING / (deviation**EVENING).log().mean().exp()
    assert torch.allclose(found[linear][[0, 1, 3, 4]].double(), wanted, rtol=1e-5)
    assert (found[linear][[2, 5]] == found[linear].min()).all()
    assert (rounding._evened(torch.zeros(3, dtype=torch.float64)) == 1).all()
    wild = rounding._evened(torch.tensor([1e-60, 1.0, 1e60, 0.0, float("nan"), float("inf")], dtype=torch.float64))
    assert torch.equal(wild, torch.tensor([1 / EVENED, 1.0, EVENED, *[1 / EVENED] * 3]))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_cost_of_evened_inputs_is_that_of_the_definition(
    loud: Loud, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's gradient has a closed form: what is predicted less what is drawn, times the weight."""
    head, (samples, length) = loud.model.lm_head, loud.ids.shape
    numbers = torch.Generator().manual_seed(1)
    divided = torch.rand(head.in_features, generator=numbers) * 5 + 0.2
    order = torch.randperm(head.in_features, generator=numbers) if mixed else None
    monkeypatch.setattr(rounding, "ALLOWED", 1e9)
    found = choose(loud.model, loud.ids, {head: Asked(8, head.in_features, order, divided)})
    places = torch.arange(head.in_features) if order is None else order
    draws, wanted = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        for sequence in loud.ids:
            states = loud.model.model(sequence[None]).last_hidden_state[0]
            chances = (states @ head.weight.T).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=draws)[:, 0]
            gradient = (chances - torch.nn.functional.one_hot(drawn, chances.shape[1])) @ head.weight
            placed = states[:, places] / divided
            error = torch.zeros_like(states)
            error[:, places] = (rounded_inputs(placed) - placed) * divided
            wanted += float((gradient * error).sum(-1).square().sum()) / 2 / (samples * length)
    assert found.cost == found.together == pytest.approx(wanted, rel=1e-3)
    assert found.cost != pytest.approx(choose(loud.model, loud.ids, {head: Asked(8, head.in_features)}).cost, rel=0.01)
