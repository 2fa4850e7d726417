"""From a question to an answer with its reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lighten.compare.operand import Version
from lighten.errors import RequestError
from lighten.recommend import published, training
from lighten.recommend.choose import Choice, Filter, choose
from lighten.recommend.published import Published
from lighten.recommend.question import Question
from lighten.recommend.sizes import Sizes, sizes_of
from lighten.recommend.training import Way
from lighten.report.numbers import byte_count


@dataclass(frozen=True)
class Recommendation:
    """The answer. `recipe` measures the formats with published figures only, or tries the way of training."""

    version: str
    question: Question
    choice: Choice
    ways: tuple[Way, ...] = ()
    way: Way | None = None
    published: tuple[Published, ...] = ()
    recipe: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def pick(self) -> str | None:
        """Name of the variant to take."""
        return self.choice.pick.name if self.choice.pick else None

    def json(self) -> dict[str, Any]:
        """Returns everything for a program."""
        value = asdict(self)
        choice = value.pop("choice")
        choice["answer"] = choice.pop("pick")
        for each in filter(None, (*choice["runners_up"], choice["answer"])):
            row = each.pop("row")
            each |= {"size_bytes": row.size_bytes, "format": row.format, "runtime": row.runtime, "path": row.path}
        return {"schema": 1, "pick": self.pick, **choice, **value}


def recommend(version: Version, question: Question) -> Recommendation:
    """Returns the variant of a version to take.

    Raises:
        RequestError: the model's sizes are needed and not known, or the context is longer than the model's.
    """
    sizes = _sizes(version, question)
    notes = [sizes.assumed] if sizes and sizes.assumed else []
    if sizes and sizes.facts.context and question.context and question.context > sizes.facts.context:
        raise RequestError(f"--context {question.context}: this model reads {sizes.facts.context:,} tokens at most")
    if question.purpose == "training":
        assert sizes
        return _training(version, question, sizes, tuple(notes))
    choice = choose(version.results, question, sizes)
    offered = published.better(version.results, question, sizes, choice.pick) if sizes else []
    if not sizes:
        notes.append("formats that were not measured are left out: the sizes of the model are not known here")
    pick = [choice.pick.name] if choice.pick else []
    text = published.recipe(version.results, {each.name: [each.step] for each in offered}, pick) if offered else None
    return Recommendation(version.results.title, question, choice, (), None, tuple(offered), text, tuple(notes))


def _sizes(version: Version, question: Question) -> Sizes | None:
    try:
        return sizes_of(version)
    except RequestError:
        if question.purpose == "training" or question.context or question.target:
            raise
        return None


def _training(version: Version, question: Question, sizes: Sizes, notes: tuple[str, ...]) -> Recommendation:
    tokens = question.context or training.TOKENS
    found = tuple(training.ways(sizes.facts, tokens))
    room = question.room
    fitting = [way for way in found if room is None or way.total <= room]
    removed = tuple(f"{way.name}: takes {byte_count(way.total)}" for way in found if way not in fitting)
    condition = f"fits {byte_count(room)}" if room else "any amount of memory"
    filters = (Filter(condition, removed),)
    if not fitting:
        return Recommendation(
            version.results.title,
            question,
            Choice(None, ("no way of training fits",), filters, ()),
            found,
            notes=notes,
        )
    way = min(fitting, key=lambda each: each.total) if question.prefer in ("memory", "size") else fitting[0]
    rule = "takes the least memory" if question.prefer in ("memory", "size") else "is the most capable"
    base = next((row for row in version.results.measured if row is version.results.baseline), None)
    start = next((row for row in version.results.measured if _is_nf4(row.facts)), base) if way.name == "qlora" else base
    reasons = [f"{way.name} training {rule} of the {len(fitting)} of {len(found)} ways that fit"]
    if start:
        reasons.append(f"it starts from {start.name}")
    one = choose(
        version.results.model_copy(update={"variants": [start] if start else []}),
        Question(prefer="size"),
        sizes,
    ).pick
    recipe = published.recipe(version.results, training.variants(way, tokens))
    return Recommendation(
        version.results.title, question, Choice(one, tuple(reasons), filters, ()), found, way, (), recipe, notes
    )


def _is_nf4(facts: dict[str, Any]) -> bool:
    return facts.get("method") == "nf4"
