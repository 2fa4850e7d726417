import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten.compare.difference import Change, Difference, Rate, Task
from lighten.compare.limits import FALLS, POINTS, RISES, judge, parse
from lighten.errors import RequestError
from lighten.evaluate.intervals import Interval


def difference(
    ppl: tuple[float, tuple[float, float] | None] | None = None, acc: tuple[float, tuple[float, float]] | None = None
) -> Difference:
    change = Change(10, 10 * ppl[0], Interval(*ppl)) if ppl else None
    tasks = (Task("t", 100, Rate(0.5, 0.5 + acc[0], Interval(*acc)), None),) if acc else ()
    return Difference("A", "B", change, tasks, None, None, None, ("memory was not measured on A",))


quantities = st.sampled_from([*RISES, *FALLS, *POINTS])
spaces = st.text(" ", max_size=2)


@given(quantities, st.decimals(0, 999, places=3), st.sampled_from(["", "+", "-"]), spaces, spaces, spaces)
def test_every_form_is_read_with_any_spaces(name: str, number: object, sign: str, a: str, b: str, c: str) -> None:
    way, unit = (">" if name in RISES else "<"), ("pp" if name in POINTS else "%")
    limit = parse(f"{a}{name}{b}{way}{c}{sign}{number}{a}{unit}{b}")
    assert limit.quantity == name
    assert limit.value == pytest.approx((-1 if sign == "-" else 1) * float(str(number)) / 100)


@given(st.text(max_size=20) | st.text("ppl acc<>+-%p0123456789.", max_size=14))
def test_nothing_else_happens_than_a_limit_or_one_message(text: str) -> None:
    with contextlib.suppress(RequestError):
        limit = parse(text)
        assert limit.quantity in (*RISES, *FALLS, *POINTS)
        assert limit.quantity in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ppl", "the forms are"),
        ("ppl > two", "the forms are"),
        ("", "acc < -1pp"),
        ("ppl >= 2%", "the forms are"),
        ("perplexity > 2%", "no quantity 'perplexity'"),
        ("ppl < 2%", "worse when it rises"),
        ("acc > 1pp", "worse when it falls"),
        ("decode > 1%", "write decode <"),
        ("acc < -1%", "given in pp"),
        ("size > 1pp", "given in %"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_forms(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse(text)


@given(st.floats(0.5, 2), st.floats(-50, 50))
def test_the_point_estimate_decides(ratio: float, percent: float) -> None:
    limit = parse(f"ppl > {percent:+.4f}%")
    (verdict,) = judge(limit, difference(ppl=(ratio, None)))
    assert verdict.failed == (ratio - 1 > limit.value)
    assert verdict.excluded is None
    assert "no interval" in verdict.sentence


@pytest.mark.parametrize(
    ("ci95", "failed", "excluded"),
    [((1.03, 1.05), True, True), ((1.01, 1.05), True, False), ((1.0, 1.015), False, True), ((0.9, 1.1), False, False)],
)
def test_the_message_says_whether_the_interval_excludes_it(
    ci95: tuple[float, float], failed: bool, excluded: bool
) -> None:
    (verdict,) = judge(parse("ppl > +2%"), difference(ppl=(sum(ci95) / 2, ci95)))
    assert (verdict.failed, verdict.excluded) == (failed, excluded)
    assert ("does not exclude" in verdict.sentence) != excluded
    assert verdict.sentence.startswith("FAILED" if failed else "ok")


def test_accuracy_is_in_points_and_equal_is_no_worse() -> None:
    (verdict,) = judge(parse("acc < -1pp"), difference(acc=(-0.02, (-0.03, -0.015))))
    assert verdict.failed and verdict.excluded
    assert "−2.00 pp acc on t" in verdict.sentence
    for text in ("ppl > +0%", "acc < -0pp"):
        (verdict,) = judge(parse(text), difference(ppl=(1.0, (1.0, 1.0)), acc=(0.0, (-0.01, 0.01))))
        assert not verdict.failed


def test_what_was_not_measured_cannot_be_judged() -> None:
    with pytest.raises(RequestError, match=r"cannot be judged: memory was not measured alike .* not measured on A"):
        judge(parse("memory > +5%"), difference(ppl=(1.0, None)))
