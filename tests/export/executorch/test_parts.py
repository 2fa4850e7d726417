"""The parts of a program that XNNPACK runs: none needs its own values by way of another operator."""

from __future__ import annotations

import pytest

pytest.importorskip("executorch.exir")

from hypothesis import given
from hypothesis import strategies as st

from lighten.export.executorch.parts import levels


@given(st.data(), st.integers(1, 12))
def test_parts_stand_one_behind_the_other(data: st.DataObject, size: int) -> None:
    inputs = {unit: data.draw(st.lists(st.integers(0, unit - 1), max_size=3)) if unit else [] for unit in range(size)}
    taken = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    found = levels(inputs, taken)
    part = {unit: ("part", found[unit]) if taken[unit] else ("alone", unit) for unit in inputs}
    needs = {each: set[tuple[str, int]]() for each in part.values()}
    for unit, read in inputs.items():
        needs[part[unit]] |= {part[each] for each in read} - {part[unit]}
    while ready := [each for each, others in needs.items() if not others]:  # none is left: there is no circle
        for each in ready:
            del needs[each]
        for others in needs.values():
            others.difference_update(ready)
    assert not needs


def test_what_lies_between_two_parts_parts_them() -> None:
    # 0 and 1 together; 2 outside; 3 behind it, 4 beside it
    assert levels({0: [], 1: [0], 2: [1], 3: [2, 1], 4: [1]}, [True, True, False, True, True]) == {
        0: 0,
        1: 0,
        2: 0,
        3: 1,
        4: 0,
    }
