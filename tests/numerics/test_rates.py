"""The learning rate rises, then falls in half a cosine."""

import pytest

from lighten.numerics.rates import share_of_rate


@pytest.mark.parametrize(("steps", "warmup", "least"), [(100, 0.1, 0.05), (20, 0.0, 0.1), (1, 0.5, 0.1)])
def test_it_rises_and_then_falls(steps: int, warmup: float, least: float) -> None:
    found = [share_of_rate(done, steps, warmup, least) for done in range(steps)]
    top = max(1, round(warmup * steps)) - 1
    assert max(found) == found[top] == 1
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found[top:]) >= least


def test_the_middle_of_the_fall_is_half_way() -> None:
    assert share_of_rate(60, 110, 10 / 110, 0.1) == pytest.approx(0.55)
