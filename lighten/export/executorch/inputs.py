"""How the inputs of linears are rounded to 8 bits while a program runs, and what that costs a model.

Every token's inputs share one scale, so a loud input takes the digits of all others. What is loud for all tokens is
often a constant: it is taken away before the rounding, and its product is added to the bias. A group of inputs that is
louder than others may be divided by a power of two, which goes to the scales of its weights. Where weights of 8 bits
are rounded here, every input is divided by a number of its own before, and its weights are multiplied by that before
they are rounded (for the head, see `head`). What is still loud is rounded apart from the rest, with a scale of its own:
what lies beyond an edge, or a few inputs. That needs a second product.

All but the numbers of single inputs go only where they are worth their work. The worth is estimated by one backward
pass: an error d of a linear's inputs moves the distribution of the model by about (gᵀd)² / 2 nats (Kullback-Leibler),
where g is the gradient of the log probability of a token that is drawn from that distribution (the Fisher information).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SAMPLES, LENGTH = 2, 512
"""Sequences that are read, and tokens of each."""
EDGE = 3.0
"""Edge, in mean sizes of the inputs."""
LOUD, MOST = 2.5, (4, 8, 16)
"""Inputs of more than so many times the mean size of the middle one are loud for all tokens; how many are set aside."""
ALLOWED = 0.0022
"""Nats per token that the rounding of inputs may cost; what is above it is mended where that takes the least work."""
STEP = 60_000
"""What an operator on single numbers takes, in products of two numbers: a microsecond on two cores of a server, in
which a product goes through 30 kB of 4-bit weights."""
EVENING = 0.25
"""Power of an input's deviation that the input is divided by and its weights are multiplied by, in linears of 8 bits
beside the head (see `head`): the rounding of inputs costs less then, and that of weights more."""
EVENED = 16.0
"""Largest number that an input is divided by, and the inverse of the smallest: what is silent in a short text may be
loud in another."""
ASIDE = 3
"""Operators that inputs set aside take: they are picked, taken from the others, and rounded."""
SUM = 40
"""What adding the output of a second product takes, in products of two numbers: for the 49,152 outputs of a
head this was a third of the 60 microseconds that its second product took."""
LOW, HIGH = -128, 127
"""Range of the codes of inputs."""


@dataclass(frozen=True)
class Asked:
    """A linear whose inputs are to be rounded."""

    bits: int
    """Those of its weights."""
    size: int
    """Inputs of a group; all of them where an output has one scale."""
    order: torch.Tensor | None = None
    """Input for each place, `[in]`; None if they stay."""
    even: torch.Tensor | None = None
    """What every input is divided by before, `[in]`, in the order of the groups; None if nothing is."""

    def placed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns inputs `[…, in]` in the order of the groups, divided."""
        found = self._ordered(inputs)
        return found if self.even is None else found / self.even

    def placed_gradients(self, gradients: torch.Tensor) -> torch.Tensor:
        """Returns gradients of inputs `[…, in]` as those of placed inputs."""
        found = self._ordered(gradients)
        return found if self.even is None else found * self.even

    def _ordered(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers if self.order is None else numbers.index_select(-1, self.order)


@dataclass(frozen=True, eq=False)
class Way:
    """How the inputs of a linear are rounded, after they were placed (see `Asked`)."""

    center: torch.Tensor | None = None
    """What is taken away from inputs, `[in]`."""
    levels: torch.Tensor | None = None
    """Powers of two that they are then divided by, `[in]`, one for each group."""
    edge: float | None = None
    """What then lies beyond it, in either direction, is rounded apart."""
    aside: torch.Tensor | None = None
    """Places of inputs that are rounded apart, `[k]`."""

    @property
    def parts(self) -> int:
        """Number of products."""
        return 1 if self.edge is None and self.aside is None else 2

    def shown(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns placed inputs `[…, in]` as a linear sees them."""
        moved = inputs if self.center is None else inputs - self.center
        level = moved if self.levels is None else moved / self.levels
        if self.edge is not None:
            near = level.clamp(-self.edge, self.edge)
        elif self.aside is not None:
            near = level.index_fill(-1, self.aside, 0)
        else:
            near = level
        found = rounded_inputs(near)
        found = found if near is level else found + rounded_inputs(level - near)
        found = found if self.levels is None else found * self.levels
        return found if self.center is None else found + self.center

    def work(self, linear: nn.Linear) -> int:
        """Returns what it takes beside the product, in products of two numbers."""
        second = 0 if self.aside is None else len(self.aside) + SUM
        second = second if self.edge is None else linear.in_features + SUM
        apart = (self.edge, self.edge) if self.aside is None else (self.aside,) * ASIDE
        alone = sum(each is not None for each in (self.center, self.levels, *apart))
        return second * linear.out_features + alone * STEP


def rounded_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """Returns inputs `[…, in]` rounded to 8 bits, with a scale and a zero point for each row, as XNNPACK does."""
    low, high = inputs.amin(-1, keepdim=True).clamp(max=0), inputs.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (HIGH - LOW)).clamp(min=1e-30)
    zero = LOW - (low / scale).round()
    return ((inputs * (1 / scale)).round().add(zero).clamp(LOW, HIGH) - zero) * scale


@dataclass(frozen=True)
class Found:
    """How the inputs of linears are to be rounded."""

    ways: dict[nn.Linear, Way]
    cost: float
    """Nats per token that it is estimated to cost; NaN if no gradient could be computed."""
    together: float
    """The same if all inputs were rounded together."""
    error: str | None = None
    """Why there is no gradient; then every linear has two parts."""


def choose(model: Any, ids: torch.Tensor, asked: Mapping[nn.Linear, Asked]) -> Found:
    """Returns how the inputs of linears are to be rounded.

    Args:
        model: a causal model. Its parameters lose their gradients.
        ids: tokens, `[samples, length]`.
        asked: the linears.
    """
    tried = _tried(model, ids, asked)
    try:
        costs = _costs(model, ids, asked, tried)
    except (RuntimeError, NotImplementedError) as error:  # an operator without a gradient
        reason = " ".join(str(error).split())[:200]
        return Found({linear: each[-1] for linear, each in tried.items()}, float("nan"), float("nan"), reason)
    found = {linear: each[0] for linear, each in tried.items()}
    together = left = sum(each[0] for each in costs.values())
    upgrades = [
        (gain / work, gain, linear, way)
        for linear, each in tried.items()
        for gain, work, way in _upgrades([way.work(linear) for way in each], costs[linear], each)
    ]
    for _, gain, linear, way in sorted(upgrades, key=lambda upgrade: -upgrade[0]):
        if left <= ALLOWED:
            break
        found[linear] = way
        left -= gain
    return Found(found, left, together)


def _upgrades(works: Sequence[int], costs: Sequence[float], ways: Sequence[Way]) -> list[tuple[float, int, Way]]:
    """Returns the gain and the work of each step from the first way to the best, the most worthwhile step first."""
    found, here = [], 0
    while better := [n for n in range(len(ways)) if costs[n] < costs[here] and works[n] > works[here]]:
        best = max(better, key=lambda n: (costs[here] - costs[n]) / (works[n] - works[here]))
        found.append((costs[here] - costs[best], works[best] - works[here], ways[best]))
        here = best
    return found


def _tried(model: Any, ids: torch.Tensor, asked: Mapping[nn.Linear, Asked]) -> dict[nn.Linear, list[Way]]:
    """Returns the ways that are tried for each linear: the plain one first, the most careful last."""
    middles = _means(model, ids, asked, lambda _, inputs: inputs)
    sizes = _means(model, ids, asked, lambda _, inputs: inputs.abs())
    moved = _means(model, ids, asked, lambda linear, inputs: (inputs - middles[linear]).abs())
    groups = {
        center: _means(model, ids, asked, lambda linear, inputs, center=center: _loudest(  # type: ignore[misc]
            inputs - middles[linear] if center else inputs, asked[linear].size
        ))
        for center in (False, True)
    }  # fmt: skip
    found: dict[nn.Linear, list[Way]] = {}
    for linear, each in asked.items():
        center, ways = middles[linear], [Way()]
        if not bool(sizes[linear].any()):  # no token came here
            found[linear] = ways
            continue
        if each.bits == 8 and each.size == linear.in_features:
            ways += [Way(center)]
            ways += [Way(aside=loud) for loud in _loud(sizes[linear])]
            ways += [Way(center, aside=loud) for loud in _loud(moved[linear])]
        else:
            ways += [Way(center), Way(None, _steps(groups[False][linear], each.size))]
            ways += [Way(center, _steps(groups[True][linear], each.size))]
            ways += [Way(center, edge=EDGE * float(moved[linear].mean()))]
            ways += [Way(edge=EDGE * float(sizes[linear].mean()))]
        found[linear] = ways
    return found


@torch.no_grad()
def even(model: Any, ids: torch.Tensor, linears: Iterable[nn.Linear]) -> dict[nn.Linear, torch.Tensor]:
    """Returns what each input is divided by so that all are of more equal size, `[in]`, above zero.

    It is the standard deviation over the tokens to the power of `EVENING`, divided by the geometric mean of all. An
    input that never changes gets the smallest number. Linears that no token reaches are left out.

    Args:
        model: a causal model.
        ids: tokens, `[samples, length]`.
        linears: those whose inputs are to be divided.
    """
    seen: dict[nn.Linear, _Moments] = {}

    def hear(linear: Any, inputs: Any) -> None:
        flat = inputs[0].reshape(-1, linear.in_features).double()
        if len(flat):
            seen.setdefault(linear, _Moments(flat[0].clone())).add(flat)

    with ExitStack() as hooks:
        for linear in linears:
            hooks.callback(linear.register_forward_pre_hook(hear).remove)
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
    return {linear: _evened(moments.variance()) for linear, moments in seen.items()}


class _Moments:
    """Sums over tokens, in float64. All are of differences from one token, so that what is constant gives zero."""

    def __init__(self, token: torch.Tensor) -> None:
        self.token, self.first, self.second, self.count = token, torch.zeros_like(token), torch.zeros_like(token), 0

    def add(self, inputs: torch.Tensor) -> None:
        moved = inputs - self.token
        self.first += moved.sum(0)
        self.second += moved.square().sum(0)
        self.count += len(inputs)

    def variance(self) -> torch.Tensor:
        return self.second / self.count - (self.first / self.count).square()


def _evened(variance: torch.Tensor) -> torch.Tensor:
    """Returns what inputs are divided by, from their variances `[in]`."""
    alive = (variance > 0) & variance.isfinite()
    if not bool(alive.any()):
        return torch.ones(len(variance))
    sizes = variance[alive].log() * (EVENING / 2)
    found = torch.full_like(variance, float(sizes.min() - sizes.mean()))
    found[alive] = sizes - sizes.mean()
    return found.exp().clamp(1 / EVENED, EVENED).float()


def _loud(sizes: torch.Tensor) -> list[torch.Tensor]:
    """Returns the places of the loudest inputs, from mean sizes `[in]`: few, more, and most of them."""
    loud = (sizes > LOUD * sizes.median()).nonzero().flatten()
    first = loud[sizes[loud].argsort(descending=True)]
    return [first[:count] for count in sorted({min(most, len(first)) for most in MOST}) if count]


def _loudest(inputs: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the largest size of an input of each group, `[tokens, in]`."""
    return inputs.abs().reshape(len(inputs), -1, size).amax(-1).repeat_interleave(size, -1)


def _steps(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the power of two for each input, `[in]`: 1 for the middle group."""
    return (groups / groups[::size].median().clamp(min=1e-30)).clamp(2.0**-8, 2.0**8).log2().round().exp2()


@torch.no_grad()
def _means(
    model: Any,
    ids: torch.Tensor,
    asked: Mapping[nn.Linear, Asked],
    compute: Callable[[nn.Linear, torch.Tensor], torch.Tensor],
) -> dict[nn.Linear, torch.Tensor]:
    """Returns the mean over the tokens of what is computed of each linear's inputs, `[in]`."""
    found = {linear: torch.zeros(linear.in_features) for linear in asked}

    def hear(linear: Any, inputs: Any) -> None:
        flat = asked[linear].placed(inputs[0]).reshape(-1, linear.in_features).float()
        found[linear] += compute(linear, flat).sum(0) / ids.numel()

    with ExitStack() as hooks:
        for linear in asked:
            hooks.callback(linear.register_forward_pre_hook(hear).remove)
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
    return found


def _costs(
    model: Any, ids: torch.Tensor, asked: Mapping[nn.Linear, Asked], tried: Mapping[nn.Linear, list[Way]]
) -> dict[nn.Linear, list[float]]:
    """Returns what each way of each linear costs, in nats per token."""
    found = {linear: [0.0] * len(ways) for linear, ways in tried.items()}
    held: dict[nn.Linear, list[torch.Tensor]] = {linear: [] for linear in tried}
    draws = torch.Generator().manual_seed(0)

    def hold(linear: Any, inputs: Any) -> None:
        held[linear].append(inputs[0].detach())

    def weigh(linear: Any, gradients: Any, _: Any) -> None:
        inputs, gradient = asked[linear].placed(held[linear].pop()), asked[linear].placed_gradients(gradients[0])
        with torch.no_grad():
            for number, way in enumerate(tried[linear]):
                moved = (gradient * (way.shown(inputs) - inputs)).sum(-1)
                found[linear][number] += float(moved.square().sum()) / 2 / ids.numel()

    model.requires_grad_(False)
    with ExitStack() as hooks, torch.enable_grad():
        hooks.callback(model.get_input_embeddings().register_forward_hook(_begins).remove)
        for linear in tried:
            hooks.callback(linear.register_forward_pre_hook(hold).remove)
            hooks.callback(linear.register_full_backward_hook(weigh).remove)
        for sequence in ids:
            logits = model(input_ids=sequence[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draws)[:, 0]
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            for inputs in held.values():
                inputs.clear()
    return found


def _begins(_: nn.Module, __: Any, rows: torch.Tensor) -> torch.Tensor:
    """Lets gradients begin at the embedding: nothing before it has one."""
    return rows.requires_grad_().clone()  # a model may change what it gets in place
