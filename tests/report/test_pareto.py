from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lighten.report.render import pareto

coordinate = st.integers(0, 6).map(float) | st.floats(-1e6, 1e6)
points = st.lists(st.tuples(coordinate, coordinate), max_size=12)


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(points)
def test_it_is_what_no_point_dominates(given_points: list[tuple[float, float]]) -> None:
    brute = [i for i, p in enumerate(given_points) if not any(dominates(q, p) for q in given_points)]
    assert sorted(pareto(given_points)) == brute


@given(points)
def test_it_runs_from_left_to_right(given_points: list[tuple[float, float]]) -> None:
    front = [given_points[i] for i in pareto(given_points)]
    assert front == sorted(front)
