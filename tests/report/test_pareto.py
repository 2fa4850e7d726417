from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lighten.report.pareto import pareto, sure_front

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


number = st.integers(0, 8).map(float)
margin = st.sampled_from([0.0, 0.5, 2.0])
measured = st.lists(st.tuples(number, margin, number, margin), max_size=8)


@given(measured)
def test_of_what_is_surely_on_the_front_no_point_surely_beats_another(
    given_points: list[tuple[float, float, float, float]],
) -> None:
    spans = [((x - dx, x + dx), (y - dy, y + dy)) for x, dx, y, dy in given_points]
    plain = [(x, y) for x, _, y, _ in given_points]
    front = sure_front(plain, spans)
    assert set(front) <= set(pareto(plain)) and bool(front) == bool(plain)
    for a in front:
        for b in front:
            surely = [spans[a][at][1] < spans[b][at][0] for at in (0, 1)]
            worse = [spans[a][at][0] > spans[b][at][1] for at in (0, 1)]
            assert not any(surely) or any(worse)


@given(points)
def test_without_intervals_it_is_the_front(given_points: list[tuple[float, float]]) -> None:
    spans = [((x, x), (y, y)) for x, y in given_points]
    assert sure_front(given_points, spans) == pareto(given_points)
