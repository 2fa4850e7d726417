"""The usual bottleneck that a profile points to, by rules on measured shares of the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["products", "attention", "dequantization", "head", "copies", "other"]
SMALL = 10e-6
"""Seconds below which an operator takes longer to start than to do."""
OVERHEAD = 0.4
"""Share of the time between operators and in small ones from which overhead is the verdict."""
LARGE = 0.3
"""Share from which one class of operators is the bottleneck."""

ADVICE = {
    "overhead": "time between operators and in small ones: launching and Python, not arithmetic; larger batches, "
    "compilation (torch.compile, CUDA graphs) or llama.cpp help, fewer bits do not",
    "weights": "products of a row with a matrix: every weight is read for a token; fewer bits per weight help, and so "
    "do larger batches and speculation",
    "products": "matrix products: arithmetic; a faster type of number or a smaller model helps",
    "attention": "attention over the context: a fused kernel, fewer key/value heads or a shorter context help",
    "dequantization": "unpacking weights to floats before each product: a fused kernel or another format helps",
    "head": "the embedding or the head: a smaller vocabulary or fewer bits for the head help",
    "copies": "copies and changes of type: a cache that is not copied at every step, one type throughout",
    "mixed": "no kind of operator has a large share",
}


@dataclass(frozen=True)
class Operator:
    """All calls of one operator for one purpose, in seconds of its own."""

    name: str
    kind: Kind
    calls: int
    seconds: float


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding: seconds from begin to end, and the operators in it."""

    name: str
    seconds: float
    operators: list[Operator] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """The bottleneck, the reason, and the shares that decide it."""

    verdict: str
    why: str
    advice: str
    shares: dict[str, float]


def judge(phase: Phase) -> Verdict:
    """Returns the verdict on a phase.

    Overhead is the time in which no operator ran, and the time of operators (except products and attention) of less
    than 10 µs a call. From 40 % on, it is the verdict. Otherwise the class with the largest share is, from 30 % on.
    """
    shares = dict.fromkeys(("products", "attention", "dequantization", "head", "copies", "other"), 0.0)
    small = 0.0
    for each in phase.operators:
        share = each.seconds / phase.seconds
        if each.kind in ("copies", "other") and each.seconds < SMALL * each.calls:
            small += share
        else:
            shares[each.kind] += share
    between = max(0.0, 1 - small - sum(shares.values()))
    shares |= {"small operators": small, "between operators": between}
    if small + between >= OVERHEAD:
        why = f"{between:.0%} of the time no operator runs, {small:.0%} goes to operators of less than 10 µs"
        return Verdict("overhead", why, ADVICE["overhead"], shares)
    kinds = [kind for kind in shares if kind not in ("other", "small operators", "between operators")]
    largest = max(kinds, key=lambda kind: shares[kind])
    if shares[largest] < LARGE:
        return Verdict("mixed", f"the largest share, of {largest}, is {shares[largest]:.0%}", ADVICE["mixed"], shares)
    name = "weights" if largest == "products" and phase.name == "decode" else largest
    return Verdict(name, f"{largest} take {shares[largest]:.0%} of the time", ADVICE[name], shares)


def collected(parts: dict[tuple[str, Kind], list[float]]) -> list[Operator]:
    """Returns an operator for every (name, kind), from the seconds of its calls."""
    return [Operator(name, kind, len(seconds), sum(seconds)) for (name, kind), seconds in parts.items()]
