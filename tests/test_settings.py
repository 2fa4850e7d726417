"""Settings that were checked, through JSON and back."""

import datetime
import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, RootModel, create_model

from lighten.errors import Failure
from lighten.pipeline.steps import checked
from lighten.settings import rebuilt
from lighten.step import Step


class First(BaseModel):
    size: int = 1


class Second(BaseModel):
    size: int = 2
    place: Path = Path("here")


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Root(RootModel[list[int]]):
    pass


class Colour(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    RED = "red"


Kind = tuple[Any, st.SearchStrategy[Any]]
"""An annotation, and values of it."""
TEXT = st.text(max_size=3)
KEPT: list[Kind] = [
    (str, TEXT),
    (bool, st.booleans()),
    (int, st.integers(-9, 9)),
    (float, st.floats(allow_nan=False)),
    (Path, TEXT.map(Path)),
    (Literal["a", 8], st.sampled_from(["a", 8])),
    (First, st.builds(First, size=st.integers(0, 9))),
    (Second, st.builds(Second, place=TEXT.map(Path))),
]
REFUSED: list[Kind] = [
    (datetime.date, st.dates()),
    (frozenset[int], st.frozensets(st.integers(0, 3))),
    (dict[int, str], st.dictionaries(st.integers(0, 3), TEXT)),
    (bytes, st.binary(max_size=2).map(lambda each: each.hex().encode())),
    (Colour, st.just(Colour.RED)),
    (Word, st.just(Word.RED)),
    (Any, st.just((1, 2))),
    (Open, st.just(Open.model_validate({"more": 1}))),
    (Root, st.just(Root([1]))),
    (Path | str, TEXT | TEXT.map(Path)),
    (First | Second, st.builds(First) | st.builds(Second)),
    (tuple[int, ...] | list[int], st.lists(st.integers(0, 3)) | st.tuples(st.integers(0, 3))),
]


def larger(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    """Annotations made of others."""
    one: list[Callable[[Kind], Kind]] = [
        lambda kind: (kind[0] | None, kind[1] | st.none()),
        lambda kind: (list[kind[0]], st.lists(kind[1], max_size=2)),  # type: ignore[name-defined]
        lambda kind: (tuple[kind[0], ...], st.lists(kind[1], max_size=2).map(tuple)),  # type: ignore[name-defined]
        lambda kind: (dict[str, kind[0]], st.dictionaries(TEXT, kind[1], max_size=2)),  # type: ignore[name-defined]
        lambda kind: (Annotated[kind[0], Field(description="x")], kind[1]),
    ]
    two: list[Callable[[Kind, Kind], Kind]] = [
        lambda a, b: (tuple[a[0], b[0]], st.tuples(a[1], b[1])),  # type: ignore[name-defined]
        lambda a, b: (a[0] | b[0], a[1] | b[1]),
    ]
    return st.builds(lambda make, kind: make(kind), st.sampled_from(one), inner) | st.builds(
        lambda make, a, b: make(a, b), st.sampled_from(two), inner, inner
    )


def through_json(made: BaseModel) -> BaseModel:
    return rebuilt(type(made), json.loads(json.dumps(made.model_dump(mode="json"))))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_settings_come_back_as_they_were_or_are_refused(data: st.DataObject) -> None:
    annotation, values = data.draw(st.recursive(st.sampled_from([*KEPT, *REFUSED]), larger, max_leaves=4))
    made = create_model("Made", setting=(annotation, ...)).model_construct(setting=data.draw(values))
    try:
        found = through_json(made)
    except TypeError:
        return
    assert repr(found) == repr(made) and found == made


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: str(kind[0]))
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_what_ours_have_is_not_refused(kind: Kind, data: st.DataObject) -> None:
    annotation, values = kind
    whole = (tuple[annotation | None, ...] | None, dict[str, list[annotation]])
    made = create_model("Made", one=(whole[0], None), two=(whole[1], {}))(
        one=(data.draw(values), None), two={"a": [data.draw(values)]}
    )
    assert repr(through_json(made)) == repr(made)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: str(kind[0]))
@settings(deadline=None, max_examples=2)
@given(data=st.data())
def test_what_json_does_not_tell_is_refused_with_its_name(kind: Kind, data: st.DataObject) -> None:
    made = create_model("Made", setting=(kind[0], ...)).model_construct(setting=data.draw(kind[1]))
    with pytest.raises(TypeError, match=r"Made\.setting: |Open holds"):
        through_json(made)


class Sneaky(Step):
    """A step of a package whose settings say something else in JSON."""

    kind = "sneaky"
    version = 1
    size: Annotated[int, PlainSerializer(lambda size: size + 1)] = 1


class Dated(Step):
    kind = "dated"
    version = 1
    day: datetime.date = datetime.date(2026, 1, 2)


@pytest.mark.parametrize(("step", "words"), [(Sneaky(), "size=2"), (Dated(), "Dated.day: ")])
def test_a_step_that_would_be_another_is_refused_before_it_runs(step: Step, words: str) -> None:
    with pytest.raises(Failure, match=f"the settings of the step {step.kind} cannot be written as JSON: .*{words}"):
        checked(step)
