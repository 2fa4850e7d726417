"""Which inputs go and how the rest is refitted, against brute force."""

import itertools

import pytest
import torch

from lighten.compress.prune import structured
from lighten.numerics.damping import damped


def problem(outputs: int = 10, width: int = 12, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator)
    inputs = torch.randn(rows, width, generator=generator) @ mixing
    return inputs, inputs.t() @ inputs, torch.randn(outputs, width, generator=generator)


def lost(inputs: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, refitted: torch.Tensor) -> float:
    return float((inputs @ weight.t() - inputs[:, kept] @ refitted.t()).square().sum())


def test_refit_is_least_squares_on_the_activations() -> None:
    inputs, gram, weight = problem()
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    found = structured.refit(weight, gram, kept, 1e-9)
    wanted = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight.t()).double()).solution.t()
    assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_damping_holds_the_kept_weights_where_they_were() -> None:
    _, gram, weight = problem()
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    assert torch.allclose(structured.refit(weight, gram, kept, 1e7), weight[:, kept], atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_cost_of_a_group_is_what_is_lost_after_the_refit(size: int) -> None:
    inputs, gram, weight = problem()
    costs = structured.group_costs(weight.t(), torch.linalg.inv(gram), size)
    for group, cost in enumerate(costs.tolist()):
        kept = torch.tensor([i for i in range(12) if i // size != group])
        refitted = structured.refit(weight, gram, kept, 1e-12)
        assert cost == pytest.approx(lost(inputs, weight, kept, refitted), rel=0.02)


@pytest.mark.parametrize("size", [1, 3])
def test_one_round_for_each_is_greedy_search(size: int) -> None:
    inputs, gram, weight = problem()
    groups = 12 // size
    left, order = list(range(groups)), []
    for _ in range(groups // 2):

        def price(group: int) -> float:
            kept = torch.tensor([g * size + i for g in left if g != group for i in range(size)])
            return lost(inputs, weight, kept, structured.refit(weight, gram, kept, 1e-12))

        order.append(min(left, key=price))
        left.remove(order[-1])
    assert structured.removal_order(weight, gram, size, groups // 2, 1e-9, rounds=groups) == order


@pytest.mark.parametrize("size", [1, 4])
def test_eliminating_is_factorising_what_is_left(size: int) -> None:
    """Each round against the inverse of what is left and its own least squares, in double precision."""
    _, gram, weight = problem(outputs=24, width=128, rows=1000)
    groups, gone = 128 // size, 64 // size
    h, left, order = damped(gram, 0.01).double(), torch.arange(groups), []
    while len(order) < gone:
        inputs = (left[:, None] * size + torch.arange(size)).flatten()
        inverse = torch.linalg.inv(h[inputs][:, inputs])
        costs = structured.group_costs(inverse @ h[inputs] @ weight.double().t(), inverse, size)
        worst = costs.argsort()[: min(-(-gone // 8), gone - len(order))]
        order += left[worst].tolist()
        left = torch.tensor([each for each in left.tolist() if each not in order])
    assert structured.removal_order(weight, gram, size, gone, 0.01, rounds=8) == order


def test_the_cost_order_beats_energy_after_the_refit() -> None:
    inputs, gram, weight = problem(outputs=16, width=64, rows=1000)
    losses = []
    for order in (
        structured.removal_order(weight, gram, 1, 16, 1e-6),
        structured.energy_order(weight, gram.diagonal(), 1)[:16],
    ):
        kept = torch.tensor([i for i in range(64) if i not in order])
        losses.append(lost(inputs, weight, kept, structured.refit(weight, gram, kept, 1e-9)))
    assert losses[0] < losses[1]


def test_energy_is_what_an_input_gives() -> None:
    inputs, gram, weight = problem()
    each = [float((inputs[:, [i]] @ weight[:, [i]].t()).square().sum()) for i in range(12)]
    assert structured.energy_order(weight, gram.diagonal(), 1) == sorted(range(12), key=lambda i: each[i])
    pairs = [each[2 * i] + each[2 * i + 1] for i in range(6)]
    assert structured.energy_order(weight, gram.diagonal(), 2) == sorted(range(6), key=lambda i: pairs[i])


def test_a_gram_that_is_no_gram_is_an_error() -> None:
    _, gram, weight = problem()
    for broken in (torch.full_like(gram, torch.nan), -gram):
        with pytest.raises(ArithmeticError):
            structured.refit(weight, broken, torch.arange(6), 0.01)
        with pytest.raises(ArithmeticError):
            structured.removal_order(weight, broken, 1, 3, 0.01)


def test_angles_are_those_between_the_states() -> None:
    states = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]]), -torch.eye(2)]
    found = structured.angular_distances(states)
    expected = [[0.0, 0.25, 1.0], [0.0, 0.75], [0.0]]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-3)


def test_angles_of_many_tokens_are_means_over_all() -> None:
    states = [torch.randn(structured.AT_ONCE * 2 + 3, 5) for _ in range(3)]
    found = structured.angular_distances(states)
    unit = [state / state.norm(dim=-1, keepdim=True) for state in states]
    for first, row in enumerate(found):
        for last, angle in enumerate(row, first):
            cosines = (unit[first] * unit[last]).sum(-1).clamp(-1, 1)
            assert angle == pytest.approx(float(cosines.acos().mean()) / torch.pi, abs=1e-3)


def test_layers_go_where_the_stream_turns_least() -> None:
    step = [0.3, 0.05, 0.2, 0.06, 0.07]
    distances = [[min(1.0, sum(step[first:last])) for last in range(first, 6)] for first in range(6)]
    assert structured.layers_to_remove(distances, 2, contiguous=False) == [1, 3]
    assert structured.layers_to_remove(distances, 2, contiguous=True) == [3, 4]
    assert structured.layers_to_remove(distances, 3, contiguous=False) == [1, 3, 4]


def test_the_cheapest_mixture_is_that_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        curves = [torch.rand(n, generator=generator).cumsum(0).tolist() for n in (4, 3, 5)]
        most = int(torch.randint(10, 60, (1,), generator=generator))

        def params(choice: tuple[int, ...]) -> int:
            return (6 - choice[2]) * (5 - choice[0] + 4 - choice[1])

        fitting = [c for c in itertools.product(range(4), range(3), range(5)) if params(c) <= most]
        found = structured.cheapest(curves, params, most)
        if not fitting:
            assert found is None
            continue
        assert found is not None and params(found) <= most

        def damage(choice: tuple[int, ...]) -> float:
            return sum(curve[i] for curve, i in zip(curves, choice, strict=True))  # noqa: B023

        assert damage(found) == pytest.approx(min(map(damage, fitting)))
