import math

import numpy as np
import pytest

from lighten.evaluate.intervals import bootstrap_ratio, mcnemar


def test_the_ratio_is_that_of_the_perplexities() -> None:
    base = np.random.default_rng(0).normal(3, 1, (12, 20))
    nll = base + np.random.default_rng(1).normal(0.05, 0.1, base.shape)
    found = bootstrap_ratio(nll, base)
    assert found.value == pytest.approx(math.exp(nll.mean()) / math.exp(base.mean()))
    assert found.ci95 is not None and found.ci95[0] < found.value < found.ci95[1]


def test_what_both_share_cancels_out() -> None:
    """Chunks that are far apart in difficulty, but the same apart in both: the interval is a point."""
    base = np.linspace(1, 9, 10)[:, None] + np.zeros((10, 5))
    found = bootstrap_ratio(base + 0.02, base)
    assert found.ci95 == pytest.approx((math.exp(0.02), math.exp(0.02)))
    assert bootstrap_ratio(base, base).ci95 == (1.0, 1.0)


def test_the_seed_decides_the_draws_and_few_chunks_have_no_interval() -> None:
    rng = np.random.default_rng(2)
    nll, base = rng.normal(3, 1, (9, 4)), rng.normal(3, 1, (9, 4))
    assert bootstrap_ratio(nll, base) == bootstrap_ratio(nll, base)
    assert bootstrap_ratio(nll, base, seed=1) != bootstrap_ratio(nll, base)
    assert bootstrap_ratio(nll[:2], base[:2]).ci95 is None


def test_the_percentiles_are_those_of_every_possible_draw() -> None:
    """Brute force: all 4⁴ ways of drawing four chunks from four, instead of 10,000 of them at random."""
    change = np.array([0.0, 0.01, 0.02, 0.05])
    draws = np.stack(np.meshgrid(*[np.arange(4)] * 4), axis=-1).reshape(-1, 4)
    means = np.exp(change[draws].mean(axis=1))
    low, high = bootstrap_ratio(change[:, None], np.zeros((4, 1)), resamples=40_000).ci95 or (0.0, 0.0)
    assert means.min() == pytest.approx(low, rel=1e-3)
    assert means.max() == pytest.approx(high, rel=1e-3)


@pytest.mark.parametrize("chunks", [8, 30])
def test_the_bootstrap_covers_the_truth_as_often_as_it_says(chunks: int) -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(600):
        low, high = bootstrap_ratio(rng.normal(0.05, 0.1, (chunks, 1)), np.zeros((chunks, 1)), resamples=1000).ci95 or (
            0,
            0,
        )
        inside += low <= math.exp(0.05) <= high
    assert inside / 600 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 0.0385742), (9, 11, 0.8238029), (7, 7, 1.0)],
)
def test_mcnemars_p_is_the_binomial_test_of_a_fair_coin(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost, 100).p == pytest.approx(p, abs=1e-6)
    assert mcnemar(lost, gained, 100).p == mcnemar(gained, lost, 100).p


def test_mcnemars_p_by_counting_every_outcome() -> None:
    flipped = 11
    for gained in range(flipped + 1):
        outcomes = [bin(outcome).count("1") for outcome in range(2**flipped)]
        uneven = abs(gained - (flipped - gained))
        brute = sum(abs(2 * heads - flipped) >= uneven for heads in outcomes) / 2**flipped
        assert mcnemar(gained, flipped - gained, 50).p == pytest.approx(brute)


def test_the_interval_of_the_difference_is_bonett_and_prices() -> None:
    """Written out: (11 − 3) / 102 ± 1.96 √((14 / 102 − (8 / 102)²) / 102)."""
    found = mcnemar(10, 2, 100)
    half = 1.959964 * math.sqrt((14 / 102 - (8 / 102) ** 2) / 102)
    assert found.difference.value == pytest.approx(0.08)
    assert found.difference.ci95 == pytest.approx((8 / 102 - half, 8 / 102 + half))
    low, high = mcnemar(0, 0, 425).difference.ci95 or (0, 0)
    assert -0.01 < low < 0 < high < 0.01


def test_the_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(4)
    draws = rng.multinomial(200, [0.06, 0.04, 0.9], size=2000)
    inside = 0
    for gained, lost, _ in draws:
        low, high = mcnemar(int(gained), int(lost), 200).difference.ci95 or (0, 0)
        inside += low <= 0.02 <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)
