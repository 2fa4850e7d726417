"""A recommendation in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from lighten.recommend.recommend import Recommendation
from lighten.recommend.training import ACTIVATIONS
from lighten.report.numbers import byte_count, change


def lines(answer: Recommendation) -> Iterator[RenderableType]:
    """Yields the lines to print: the pick, the reasons, what was removed, and the alternatives."""
    pick, choice = answer.choice.pick, answer.choice
    if pick:
        verb = f"Train ({answer.way.name}) from" if answer.way else "Perhaps take" if choice.cautions else "Take"
        yield Text(f"{verb} {pick.name} of {answer.version}", style="bold")
        if not answer.way:
            yield Text(f"  {pick.line()}")
    else:
        yield Text(f"Nothing of {answer.version} to take", style="bold red")
    for reason in choice.reasons:
        yield Text(f"  {reason}")
    for caution in choice.cautions:
        yield Text(f"  {caution}", style="yellow")
    for each in choice.filters:
        yield Text(f"\n{each.condition}")
        for line in each.removed or ("removes nothing",):
            yield Text(f"  {line}", style="dim")
    if answer.ways:
        yield Text("\nMemory of training, one text at a time (computed by published formulas, not measured)")
        for way in answer.ways:
            total = (
                f"{byte_count(way.total)}: {byte_count(way.weights)} and {byte_count(way.activations)} of activations"
            )
            yield Text(f"  {way.name}: {total}")
            yield Text(f"    {way.formula}", style="dim")
        yield Text(f"  {ACTIVATIONS}", style="dim")
    if choice.runners_up:
        yield Text("\nRunners-up: no other is better in both respects")
        for other in choice.runners_up:
            yield Text(f"  {other.name}: {other.line()}")
    if answer.published:
        yield Text("\nNot measured here, perhaps better (perplexity as published of another model, size computed)")
        for offer in answer.published:
            rise = f"perplexity {change(offer.rise, None)[0]} % of {offer.of}"
            yield Text(f"  {offer.name}: about {byte_count(offer.size_bytes)}, {rise}")
        for source in dict.fromkeys(offer.source for offer in answer.published):
            yield Text(f"  published in {source}", style="dim")
    for note in answer.notes:
        yield Text(f"\n{note}", style="yellow")
    if answer.recipe:
        what = "The recipe that tries it" if answer.way else "The recipe that measures them"
        yield Text(f"\n{what}; save it and `lighten run` it:\n")
        yield Text(answer.recipe)
