from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.report import numbers


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (25.6033, 4, "25.60"),
        (9.9996, 4, "10.00"),
        (1234.5, 3, "1,230"),
        (104.6, 3, "105"),
        (0.15232, 3, "0.152"),
        (0, 3, "0"),
        (-2.5, 2, "−2.5"),
        (3e-9, 3, "<0.000001"),
    ],
)
def test_significant(value: float, digits: int, text: str) -> None:
    assert numbers.significant(value, digits) == text


@given(st.floats(1e-3, 1e9), st.integers(1, 6))
def test_significant_is_as_near_as_its_digits_allow(value: float, digits: int) -> None:
    read = float(numbers.significant(value, digits, decimals=12).replace(",", ""))
    assert read == pytest.approx(float(f"{value:.{digits}g}"), rel=1e-9)


@pytest.mark.parametrize(
    ("uncertainty", "decimals"), [(13.0, 0), (4.9, 0), (2.2, 1), (0.8, 1), (0.15, 2), (0.04, 2), (0.0001, 3), (0, 3)]
)
def test_an_uncertainty_decides_the_decimals(uncertainty: float, decimals: int) -> None:
    assert numbers.decimals_for(uncertainty) == decimals


def test_change() -> None:
    assert numbers.change(0.14713, (0.1388, 0.1556)) == ("+14.7", "[+13.9, +15.6]")
    assert numbers.change(0.0005, (-0.0003, 0.0013)) == ("+0.05", "[−0.03, +0.13]")
    assert numbers.change(-0.00001, None) == ("0.00", "")
    assert numbers.change(0.0, (0.0, 0.0)) == ("0.000", "[0.000, 0.000]")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (105_454_304, "105 MB"), (1_213_000_000, "1.21 GB")]
)
def test_bytes_are_decimal(size: int, text: str) -> None:
    assert numbers.byte_count(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.43, "0.4 s"), (8.72, "8.7 s"), (78.2, "78 s"), (171.2, "2 min 51 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


def test_only_a_whole_is_100_percent() -> None:
    assert [numbers.share(value) for value in (1.0, 0.9999, 0.9791, 0.0)] == ["100", ">99.9", "97.9", "0.0"]


def test_a_column_has_one_unit() -> None:
    assert numbers.byte_unit([269_000_000, 1_200_000_000]) == ("MB", 1e6)
    assert numbers.byte_unit([16_000_000_000, 900_000_000]) == ("GB", 1e9)
    assert numbers.byte_unit([None]) == ("MB", 1e6)
