"""A comparison in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lighten.compare.compare import Comparison
from lighten.compare.difference import Change, Difference, Rate
from lighten.compare.flips import Flip
from lighten.report.numbers import NOT_MEASURED, byte_count, change, fixed, ratio, significant

BEFORE = 160
"""Number of characters of context that are shown before a token or an ending."""
LEGEND = (
    "95 %: paired bootstrap over chunks of text, Bonett and Price over tasks. "
    "+ and −: tasks that only B and only A answers rightly, with McNemar's exact p."
)


def lines(comparison: Comparison, flips: int) -> Iterator[RenderableType]:
    """Yields the lines to print. `flips` is the number of flipped tasks of each set that are shown in full."""
    for each in comparison.differences:
        yield Text(f"{each.a} → {each.b}", style="bold")
        yield _grid(each)
        if len(comparison.differences) == 1:
            yield from _flipped(each, flips)
        for note in each.notes:
            yield Text(f"  {note}", style="yellow")
        yield Text("")
    if any(each.perplexity or each.accuracy for each in comparison.differences):
        yield Text(LEGEND, style="dim")
        yield Text("")
    yield from _tokens(comparison)
    for line in comparison.alone:
        yield Text(line, style="yellow")
    for verdict in comparison.verdicts:
        yield Text(verdict.sentence, style="bold red" if verdict.failed else "green")


def _grid(each: Difference) -> Table:
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=True)
    for heading, justify in (("", "left"), ("A", "right"), ("B", "right"), ("change", "right"), ("95 %", "left")):
        grid.add_column(Text(heading, style="dim"), justify="right" if justify == "right" else "left", no_wrap=True)
    grid.add_column("")
    if each.perplexity:
        how = f"{each.perplexity.units} chunks" if each.perplexity.ratio.ci95 else ""
        grid.add_row("perplexity", *_values(each.perplexity), *_relative(each.perplexity), how)
    for task in each.accuracy:
        for name, rate in ((f"{task.task} acc", task.acc), (f"{task.task} acc_norm", task.acc_norm)):
            if rate:
                grid.add_row(name, *(f"{fixed(100 * value, 1)} %" for value in (rate.a, rate.b)), *_points(rate))
    for name, found in (("size", each.size), ("peak memory", each.memory)):
        if found:
            sizes = (byte_count(int(value)) for value in (found.a, found.b))
            grid.add_row(name, *sizes, *_relative(found), ratio(found.ratio.value))
    if each.decode:
        speeds = (f"{significant(value, 3)} tok/s" for value in (each.decode.a, each.decode.b))
        grid.add_row("decode", *speeds, *_relative(each.decode), ratio(each.decode.ratio.value))
    return grid


def _values(found: Change) -> tuple[str, str]:
    return significant(found.a, 5), significant(found.b, 5)


def _relative(found: Change) -> tuple[str, str]:
    ci95 = found.ratio.ci95
    text, interval = change(found.ratio.value - 1, (ci95[0] - 1, ci95[1] - 1) if ci95 else None)
    return f"{text} %", interval


def _points(rate: Rate) -> tuple[str, str, str]:
    text, interval = change(rate.difference.value, rate.difference.ci95, least=1)
    if rate.p is None:
        return f"{text} pp", interval, ""
    p = significant(rate.p, 2, decimals=4)
    return f"{text} pp", interval, f"+{rate.gained} −{rate.lost}, p {p}"


def _flipped(each: Difference, most: int) -> Iterator[RenderableType]:
    for task in each.accuracy:
        shown = [flip for way in ("lost", "gained") for flip in [f for f in task.flips if f.way == way][:most]]
        for flip in shown:
            yield from _flip(task.task, flip)
        if left := len(task.flips) - len(shown):
            yield Text(
                f"  … and {left} more of {task.task} (--flips {len(task.flips)} or --json shows all)", style="dim"
            )


def _flip(task: str, flip: Flip) -> Iterator[RenderableType]:
    yield Text(f"  {flip.way}: {task} {flip.number}", style="red" if flip.way == "lost" else "green")
    if flip.context is not None:
        wrong = flip.chosen_b if flip.way == "lost" else flip.chosen_a
        yield Text(f"    {_end(flip.context)}")
        yield Text(f"    right: {flip.right}")
        yield Text(f"    {'B' if flip.way == 'lost' else 'A'} chose: {wrong}")


def _tokens(comparison: Comparison) -> Iterator[RenderableType]:
    if comparison.tokens_missing:
        yield Text(f"no tokens are named: {comparison.tokens_missing}\n", style="yellow")
    for place in comparison.tokens or ():
        head = f"KL {significant(place['kl'], 3)} nats, chunk {place['chunk']}, token {place['position']}"
        yield Text(head, style="bold")
        before, after = _end(place["before"]), " ".join(place["after"].split("\n"))
        yield Text.assemble(f"  {before}", (f"»{_seen(place['token'])}«", "reverse"), after)
        for side, name in (("first", "A"), ("second", "B")):
            if found := place.get(side):
                p, actual = (significant(100 * found[key], 2, decimals=2) for key in ("p", "p_actual"))
                yield Text(
                    f"  {name}: {_seen(found['token'])!r} {p} %, the token that is there {actual} %", style="dim"
                )
    if comparison.tokens:
        yield Text("")


def _end(text: str) -> str:
    """Returns the end of a text, on one line."""
    flat = " ".join(text.split("\n"))
    return flat if len(flat) <= BEFORE else f"…{flat[-BEFORE:]}"


def _seen(token: str) -> str:
    return token.replace("\n", "⏎") or NOT_MEASURED
