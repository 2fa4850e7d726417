"""The interval of a median against chance, and drift against scatter."""

import random
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.numerics import steady


@pytest.mark.parametrize("count", [6, 9, 12, 20])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    dice = np.random.default_rng(count)
    samples = dice.lognormal(0.0, 1.0, (4000, count))  # its median is 1
    held = np.mean([low <= 1 <= high for low, high in map(steady.interval, samples)])
    assert held > 0.94


def test_few_values_are_all_of_it() -> None:
    assert steady.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert steady.interval([5.0]) == (5.0, 5.0)
    assert steady.interval([float(n) for n in range(9)]) == (1.0, 7.0)  # the sign test's table for n = 9


@given(st.lists(st.floats(0.1, 1000), min_size=1, max_size=30))
def test_measures_of_any_speeds(values: list[float]) -> None:
    low, high = steady.interval(values)
    assert min(values) <= low <= median(values) <= high <= max(values)
    assert 0 <= steady.relative_error(values) <= steady.spread(values)
    assert steady.drift(values[:5]) == 0


def test_drift_is_a_change_with_time() -> None:
    falling = [100.0 - 2 * n for n in range(12)]
    assert steady.drift(falling) == pytest.approx(80 / 98 - 1, abs=0.03)
    shuffled = list(falling)
    random.Random(4).shuffle(shuffled)
    assert steady.drift(shuffled) == 0
    assert steady.drift([100.0, 100.1] * 6) == 0
