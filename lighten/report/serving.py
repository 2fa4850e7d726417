"""How variants serve: requests that keep arriving, drafts, and speeds that two measurements do not agree on."""

from __future__ import annotations

from itertools import combinations

from lighten.report.numbers import fixed, ratio, share, significant
from lighten.report.results import Percentiles, Results, Speculative, Speed, Variant
from lighten.steady import REPEATED, apart


def serving(results: Results) -> list[str]:
    """Returns a sentence for every rate of requests, and one for every draft."""
    found = []
    for variant in results.measured:
        for each in variant.load:
            waits = [f"first token {_times(each.ttft_ms)}"]
            waits += [f"between tokens {_times(each.token_ms)}"] if each.token_ms else []
            found.append(
                f"{variant.name}, {each.rate:g} requests a second ({each.server}): {each.completed} of {each.requests} "
                f"completed, {significant(each.throughput_tok_s, 3)} tok/s; {', '.join(waits)}"
            )
        if variant.speculative:
            found.append(f"{variant.name}: {drafted(variant.speculative)}")
    return found


def _times(found: Percentiles) -> str:
    p50, p95, p99 = (significant(each, 3) for each in (found.p50, found.p95, found.p99))
    return f"{p50} ms (p95 {p95}, p99 {p99})"


def drafted(each: Speculative) -> str:
    """Returns what a draft is worth, in words."""
    same = "the texts are the same token by token"
    if each.parted:
        gap = max(part.gap for part in each.parted)
        of = f" of {each.texts}" if each.texts else ""
        same = (
            f"{len(each.parted)}{of} texts are not the same: they part where the two likeliest logits differ by "
            f"{significant(gap, 2)} at most"
        )
    return (
        f"with {each.draft} as its draft, {each.tokens} tokens at a time, {share(each.acceptance)} % of them kept: "
        f"{significant(each.decode_tok_s, 3)} tok/s instead of {significant(each.plain_tok_s, 3)} "
        f"({ratio(each.speedup)}); {same}"
    )


def doubts(results: Results) -> tuple[str, ...]:
    """Returns a sentence for every two measurements of the same, on this machine, that differ by more than 5 %."""
    found = []
    for first, second in combinations([each for each in results.measured if not each.elsewhere], 2):
        if _same(first, second):
            for ours, theirs in _pairs(first, second):
                if line := told(ours, theirs):
                    found.append(f"{first.name} and {second.name} are the same, and {line}")
    return tuple(found)


def told(ours: Speed, theirs: Speed) -> str | None:
    """Returns by how much two measurements of the same speed differ, in words; None if it is no more than 5 %."""
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
    """Whether two rows are measurements of one speed."""
    shapes = [(each.batch, each.prompt, each.generate, each.dtype, each.how) for each in (ours, theirs)]
    return shapes[0] == shapes[1]


def _pairs(first: Variant, second: Variant) -> list[tuple[Speed, Speed]]:
    return [(ours, theirs) for ours in first.speed for theirs in second.speed if alike(ours, theirs)]


def _same(first: Variant, second: Variant) -> bool:
    by_key = first.key is not None and first.key == second.key
    by_path = first.key is None and first.path is not None and first.path == second.path
    return (by_key or by_path) and first.device == second.device
