"""The rules, one by one; tests/evaluate/profiling/test_profile.py lets them judge real profiles."""

import pytest

from lighten.evaluate.profiling.verdict import ADVICE, Kind, Operator, Phase, judge


def phase(name: str = "decode", seconds: float = 1.0, calls: int = 10, **shares: float) -> Phase:
    return Phase(name, seconds, [Operator(kind, kind, calls, share) for kind, share in shares.items()])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["attention", "dequantization", "head", "copies"])
def test_the_largest_kind_is_the_bottleneck(kind: Kind) -> None:
    found = judge(phase(**{kind: 0.5, "products": 0.4}))
    assert found.verdict == kind and "50%" in found.why and found.advice == ADVICE[kind]


def test_products_are_the_reading_of_weights_while_decoding_only() -> None:
    assert judge(phase(products=0.8)).verdict == "weights"
    assert judge(phase("prefill", products=0.8)).verdict == "products"


def test_time_in_which_nothing_runs_is_overhead() -> None:
    found = judge(phase(products=0.55))
    assert found.verdict == "overhead" and found.shares["between operators"] == pytest.approx(0.45)


def test_operators_that_end_before_they_are_worth_starting_are_overhead() -> None:
    found = judge(phase(calls=100_000, products=0.55, other=0.43))
    assert found.verdict == "overhead" and found.shares["small operators"] == pytest.approx(0.43)
    assert judge(phase(calls=10, products=0.55, other=0.43)).verdict == "weights"


def test_products_never_count_as_small() -> None:
    assert judge(phase(calls=1_000_000, products=0.9)).verdict == "weights"


def test_no_large_share_is_called_mixed() -> None:
    found = judge(phase(products=0.25, attention=0.2, copies=0.2, other=0.3))
    assert found.verdict == "mixed" and sum(found.shares.values()) == pytest.approx(1)
