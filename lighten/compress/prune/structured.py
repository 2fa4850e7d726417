"""Structured pruning: which inputs of a projection can go at the least cost, and the repair of what stays.

The MLP's channels are the inputs of its down projection, and the attention heads those of its output projection. H is
the Gram of those inputs. If a set S of inputs goes, the rest K can give the outputs of S as well as least squares
allows: W' = W H[:,K] H[K,K]⁻¹. The loss is then tr(W[:,S] (H⁻¹[S,S])⁻¹ W[:,S]ᵀ).

Least squares and that cost are those of optimal brain surgeon (Hassibi & Stork, 1993), for whole inputs at once. The
angular distance of layers is that of Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (2024).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from lighten.numerics.damping import damped

ROUNDS = 16
"""Number of times that the costs of channels are computed anew while a matrix is emptied."""
AT_ONCE = 128
"""Number of tokens whose unit vectors, of every layer, are in memory at a time."""


def refit(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """Returns weights for the inputs `kept` that give the old output as nearly as they can.

    Args:
        weight: `[out, in]`.
        gram: `[in, in]`, float32: XᵀX.
        kept: positions of the inputs that stay.
        damp_percent: share of mean diag(H) that pulls the new weights towards the old ones.

    Returns:
        float32 `[out, kept]`.

    Raises:
        ArithmeticError: the Gram of the kept inputs could not be factorised.
    """
    old = weight.float()
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    lower, failed = torch.linalg.cholesky_ex(damped(gram, damp_percent)[kept][:, kept])
    if failed or not torch.isfinite(lower.diagonal()).all():
        raise ArithmeticError("not positive definite")
    # as a change of the kept weights: damping then holds them back, and does not shrink them
    change = torch.cholesky_solve(gram[kept][:, gone] @ old[:, gone].t(), lower)
    return old[:, kept] + change.t()


def removal_order(
    weight: torch.Tensor, gram: torch.Tensor, size: int, count: int, damp_percent: float, rounds: int = ROUNDS
) -> list[int]:
    """Returns which groups of inputs to remove, cheapest first. Each cost is that after the earlier groups are gone.

    Args:
        weight: `[out, in]`.
        gram: `[in, in]`, float32.
        size: neighbouring inputs that go together (1: every input by itself).
        count: number of groups to name.
        damp_percent: share of mean diag(H) added to it.
        rounds: number of times that the costs are computed anew; few groups get a round each.
    """
    w = weight.float().t()  # [in, out]: from here on as they are after the repair of what is gone
    lower, failed = torch.linalg.cholesky_ex(damped(gram, damp_percent))
    if failed:
        raise ArithmeticError("not positive definite")
    inverse = torch.cholesky_inverse(lower)
    left = torch.arange(len(inverse) // size, device=inverse.device)
    order: list[int] = []
    step = max(1, -(-count // rounds))
    while len(order) < count:
        worst = torch.argsort(group_costs(w, inverse, size), stable=True)[: min(step, count - len(order))]
        order += left[worst].tolist()
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[worst] = False
        left = left[stays]
        if len(order) < count:
            w, inverse = _without(w, inverse, ~stays.repeat_interleave(size))
    return order


def _without(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the repaired weights `[in, out]` and H⁻¹ of the inputs that stay: what goes is eliminated from both.

    That takes a product of n · n · gone, where the factorisation of what is left would take n · n · n.
    """
    stays = ~gone
    lower, failed = torch.linalg.cholesky_ex(inverse[gone][:, gone])
    if failed:
        raise ArithmeticError("not positive definite")
    half = torch.linalg.solve_triangular(lower, inverse[gone][:, stays], upper=False)
    change = torch.linalg.solve_triangular(lower, weight[gone], upper=False)
    return weight[stays] - half.t() @ change, inverse[stays][:, stays] - half.t() @ half


def group_costs(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """Returns tr(W[:,S] (H⁻¹[S,S])⁻¹ W[:,S]ᵀ) of groups of `size` neighbouring inputs; `weight` is `[in, out]`."""
    if size == 1:
        return weight.square().sum(1) / inverse.diagonal()
    groups = len(inverse) // size
    blocks = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    rows = weight.view(groups, size, -1)
    costs: torch.Tensor = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
    return costs


def energy_order(weight: torch.Tensor, diagonal: torch.Tensor, size: int) -> list[int]:
    """Returns groups of inputs by H[j,j] · ‖W[:,j]‖², the least first: what they give, without any repair."""
    energy = diagonal * weight.float().square().sum(0)
    return torch.argsort(energy.view(-1, size).sum(1), stable=True).tolist()


def angular_distances(states: list[torch.Tensor], device: str = "cpu") -> list[list[float]]:
    """Returns the mean angle, in half turns, between the residual stream before layer l and before layer m.

    Args:
        states: `[tokens, hidden]` before every layer and after the last one.
        device: where to compute.

    Returns:
        A row for every l, with an entry for each m ≥ l.
    """
    count = len(states)
    cosines = torch.empty(count, count, len(states[0]), device=device)
    for start in range(0, len(states[0]), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        unit = [torch.nn.functional.normalize(state[some].to(device).float(), dim=-1) for state in states]
        for first, here in enumerate(unit):
            for last, there in enumerate(unit[first:], first):
                cosines[first, last, some] = (here * there).sum(-1)
    angles = cosines.clamp_(-1, 1).acos_()
    return [[float(each.mean()) / torch.pi for each in row[first:]] for first, row in enumerate(angles)]


def layers_to_remove(distances: list[list[float]], count: int, contiguous: bool) -> list[int]:
    """Returns the layers across which the residual stream turns least.

    Contiguous layers are the run with the least angle between its ends. Free layers are those with the least angle
    each.
    """
    layers = len(distances) - 1
    if contiguous:
        first = min(range(layers - count + 1), key=lambda start: distances[start][count])
        return list(range(first, first + count))
    return sorted(sorted(range(layers), key=lambda layer: distances[layer][1])[:count])


def cheapest(curves: list[list[float]], params: Callable[[tuple[int, ...]], int], most: int) -> tuple[int, ...] | None:
    """Returns the choice, one from each curve, that is small enough with the least sum of damages; None if none is.

    Args:
        curves: of every way to prune, the damage of each of its choices.
        params: weights that a choice leaves.
        most: weights that may be left.
    """
    choices = itertools.product(*(range(len(curve)) for curve in curves))
    fitting = [choice for choice in choices if params(choice) <= most]

    def damage(choice: tuple[int, ...]) -> float:
        return sum(curve[index] for curve, index in zip(curves, choice, strict=True))

    return min(fitting, key=damage, default=None)
