"""How variants serve: requests that keep arriving, draft models, and speeds on which two measurements disagree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from lighten.numerics.steady import REPEATED, apart
from lighten.report.numbers import NOT_MEASURED, fixed, ratio, share, significant
from lighten.report.part import Grid, Part
from lighten.results.measured import Percentiles, ServedLoad, Speculative, Speed
from lighten.results.results import Results, Variant

LOADS = ("Variant", "Requests a second", "Completed", "Tok/s", "First token, ms", "Between tokens, ms", "Server")
DRAFTS = ("Variant", "Draft", "Proposed at once", "Kept, %", "Tok/s", "Plain, tok/s", "Times", "The same texts")


def serving(results: Results, _earlier: Sequence[Results]) -> Part | None:
    """Returns the section about requests that keep arriving and about drafts; None if neither was measured."""
    loads = tuple(_load(variant.name, each) for variant in results.measured for each in variant.load)
    drafts = tuple(_draft(each.name, each.speculative) for each in results.measured if each.speculative)
    grids = []
    if loads:
        grids.append(Grid(LOADS, loads, "Requests that arrive at random; times at p50, p95 and p99"))
    if drafts:
        grids.append(Grid(DRAFTS, drafts, "Greedy decoding with a smaller model's proposals", text=2))
    notes = [_parted(each.name, each.speculative) for each in results.measured if each.speculative]
    notes += [_failed(variant.name, each) for variant in results.measured for each in variant.load]
    return Part("Serving", grids=tuple(grids), notes=tuple(filter(None, notes))) if grids else None


def load_lines(results: Results) -> tuple[str, ...]:
    """Returns a line for each load, for the terminal."""
    found = []
    for variant in results.measured:
        for each in variant.load:
            users = "1 user" if each.concurrency == 1 else f"{each.concurrency} users"
            arriving = f"{each.rate:g} requests a second" if each.rate is not None else users
            between = f", between tokens {significant(each.token_ms.p50, 3)} ms" if each.token_ms else ""
            found.append(
                f"{variant.name}, {arriving}: {each.completed} of {each.requests} answered, "
                f"{significant(each.throughput_tok_s, 3)} tok/s, first token {significant(each.ttft_ms.p50, 3)} ms"
                f"{between} (p50)"
            )
            found += [_failed(variant.name, each)] if each.errors else []
    return tuple(found)


def _load(name: str, each: ServedLoad) -> tuple[str, ...]:
    between = _times(each.token_ms) if each.token_ms else NOT_MEASURED
    completed = f"{each.completed} of {each.requests}"
    speed = significant(each.throughput_tok_s, 3)
    arriving = f"{each.concurrency:,} at once" if each.rate is None else f"{each.rate:g}"
    return name, arriving, completed, speed, _times(each.ttft_ms), between, each.server


def _failed(name: str, each: ServedLoad) -> str:
    if not each.errors:
        return ""
    reasons = "; ".join(f"{count} × {reason}" for reason, count in each.errors.items())
    return f"{name}: {each.requests - each.completed} of {each.requests} requests failed: {reasons}"


def _times(found: Percentiles) -> str:
    return ", ".join(significant(each, 3) for each in (found.p50, found.p95, found.p99))


def _draft(name: str, each: Speculative) -> tuple[str, ...]:
    same = "all" if not each.parted else f"all but {len(each.parted)} of {each.texts}"
    speeds = (significant(each.decode_tok_s, 3), significant(each.plain_tok_s, 3), ratio(each.speedup))
    return name, each.draft, str(each.tokens), share(each.acceptance), *speeds, same


def _parted(name: str, each: Speculative) -> str:
    if not each.parted:
        return ""
    gap = significant(max(part.gap for part in each.parted), 2)
    return f"{name}: texts part where the two likeliest logits differ by {gap} at most"


def doubts(results: Results) -> tuple[str, ...]:
    """Returns a sentence for every two measurements of the same speed here that differ by more than 5 %."""
    found = []
    for first, second in combinations([each for each in results.measured if not each.elsewhere], 2):
        if _same(first, second):
            for ours, theirs in _pairs(first, second):
                if line := speeds_apart(ours, theirs):
                    found.append(f"{first.name} and {second.name} are the same, and {line}")
    return tuple(found)


def speeds_apart(ours: Speed, theirs: Speed) -> str | None:
    """Returns in words how far two measurements of one speed differ; None if it is 5 % at most."""
    if not (ours.decode_tok_s and theirs.decode_tok_s):
        return None
    change = apart(ours.decode_tok_s, theirs.decode_tok_s)
    if change <= REPEATED:
        return None
    return (
        f"their decode speeds at batch {ours.batch}, prompt {ours.prompt:,} differ by {fixed(100 * change, 1)} %, "
        f"more than the {fixed(100 * REPEATED, 0)} % of a quiet machine: measure again"
    )


def alike(ours: Speed, theirs: Speed) -> bool:
    """Whether two rows measure the same speed."""
    shapes = [(each.batch, each.prompt, each.generate, each.dtype, each.how) for each in (ours, theirs)]
    return shapes[0] == shapes[1]


def _pairs(first: Variant, second: Variant) -> list[tuple[Speed, Speed]]:
    return [(ours, theirs) for ours in first.speed for theirs in second.speed if alike(ours, theirs)]


def _same(first: Variant, second: Variant) -> bool:
    by_key = first.key is not None and first.key == second.key
    by_path = first.key is None and first.path is not None and first.path == second.path
    return (by_key or by_path) and first.device == second.device
