import itertools
import math
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.errors import RequestError
from lighten.numerics import knapsack
from lighten.numerics.knapsack import Option, choose
from lighten.settings import parse_size

OPTIONS = st.builds(Option, st.integers(0, 30), st.floats(0, 100))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def cheapest(items: list[list[Option]], capacity: int) -> float | None:
    every = itertools.product(*items)
    fit = [sum(one.cost for one in taken) for taken in every if sum(one.size for one in taken) <= capacity]
    return min(fit, default=None)


@given(ITEMS, st.integers(1, 7), st.integers(0, 160), st.integers(0, 20))
@settings(deadline=None)
def test_is_as_cheap_as_the_best_of_all_combinations(
    items: list[list[Option]], grain: int, capacity: int, fixed: int
) -> None:
    items = [[Option(one.size * grain, one.cost) for one in options] for options in items]
    best = cheapest(items, capacity - fixed)
    if best is None:
        with pytest.raises(RequestError):
            choose(items, capacity, fixed)
        return
    choice = choose(items, capacity, fixed)
    taken = [options[index] for options, index in zip(items, choice.indices, strict=True)]
    assert choice.exact
    assert choice.size == fixed + sum(one.size for one in taken) <= capacity
    assert choice.cost == pytest.approx(sum(one.cost for one in taken))
    assert choice.cost == pytest.approx(best)


@given(ITEMS, st.integers(0, 160))
@settings(deadline=None)
def test_a_table_that_would_be_too_large_is_made_coarser_and_the_budget_still_holds(
    items: list[list[Option]], capacity: int
) -> None:
    best = cheapest(items, capacity)
    if best is None:
        return
    with patch.object(knapsack, "MAX_UNITS", 9):
        choice = choose(items, capacity)
    assert choice.size <= capacity
    assert choice.cost >= best or choice.cost == pytest.approx(best)
    assert not choice.exact or choice.cost == pytest.approx(best)


def test_large_sizes_without_a_common_divisor_are_rounded() -> None:
    items = [[Option(prime, 1.0), Option(1_000_000_007, 0.0)] for prime in (101, 103, 107)]
    choice = choose(items, 2_500_000_000)
    assert not choice.exact
    assert choice.cost == 1.0


def test_names_the_smallest_size_there_is() -> None:
    with pytest.raises(RequestError, match=r"3,000,000 bytes .* 5,000,002 bytes \(5\.01 MB\)"):
        choose([[Option(2, 1.0), Option(9, 0.0)]], 3_000_000, fixed=5_000_000)


def test_the_smallest_size_fits_exactly() -> None:
    assert choose([[Option(9, 0.0), Option(2, 1.0)], [Option(3, 0.0)]], 5).indices == [1, 0]


def test_equal_costs_take_the_smaller() -> None:
    assert choose([[Option(4, 1.0), Option(2, 1.0)]], 10).size == 2


def test_nothing_to_choose() -> None:
    assert choose([], 3).indices == []


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_refuses_costs_that_are_no_numbers(cost: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        choose([[Option(1, cost)]], 10)


@pytest.mark.parametrize(
    ("text", "size"),
    [("90MB", 90_000_000), ("1.1 GB", 1_100_000_000), ("2KiB", 2048), ("1.5mib", 1_572_864), ("7", 7), ("4 kb", 4000)],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "90 megs", "-3MB", "1e6", "nan"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
